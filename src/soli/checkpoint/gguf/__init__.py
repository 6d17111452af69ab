"""GGUF files, which llama.cpp runs: tensors by name and shape, keys (metadata), vocabulary, and writing (convert)."""
