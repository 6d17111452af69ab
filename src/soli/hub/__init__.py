"""Models of the Hugging Face hub: found in its cache on this machine, fetched only when that is asked for."""
