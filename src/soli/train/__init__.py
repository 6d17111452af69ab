"""Training: recipe -> batches -> losses -> optimizer step -> bias step -> checkpoint. See docs/training.md."""
