"""Samples of a trained prior."""
