"""FP8 training (paper section 3.3): exact emulation on any device, and a GPU's own products."""
