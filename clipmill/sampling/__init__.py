"""Draws samples from a trained prior."""
