"""Generation: requests, continuous batching over a paged latent cache, sampling, speculation."""
