"""What a run or a model needs before it starts: memory, throughput, cost."""
