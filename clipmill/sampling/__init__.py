"""Samples of a trained prior."""

from __future__ import annotations

from clipmill.sampling.generate import generate

__all__ = ["generate"]
