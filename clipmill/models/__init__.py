"""The tokenizer (VQ-VAE) and the prior, and their exports."""

from __future__ import annotations

from clipmill.models.export import load_prior, load_vqvae, save_export
from clipmill.models.prior import Prior
from clipmill.models.vqvae import VQVAE, VQVAEOutput, latent_shape, to_input, to_pixels

__all__ = [
    "Prior",
    "VQVAE",
    "VQVAEOutput",
    "latent_shape",
    "load_prior",
    "load_vqvae",
    "save_export",
    "to_input",
    "to_pixels",
]
