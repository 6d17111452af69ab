"""Generation: the latent cache, sampling, batched decoding, and forced reading of texts for measurement."""
