"""From packages to packed tokens: corpora, cleaning, the tokenizer, the mixture, and the memory-mapped reader."""
