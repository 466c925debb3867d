"""The tokenizer (VQ-VAE), the prior, and their exports."""
