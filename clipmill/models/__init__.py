"""The tokenizer (VQ-VAE) and the prior, and their exports."""
