"""Where expert weights are when they are not all in memory: files, a cache over them, and who is evicted."""
