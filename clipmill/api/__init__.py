"""The Python API: loads trained models and data sets by URL. ``docs/python.md`` shows how."""

from __future__ import annotations

from clipmill.api.datasets import ClipDataset, Loader, open_dataset
from clipmill.api.films import write_video
from clipmill.api.generator import Generator, Samples
from clipmill.api.given import GeneratorInfo
from clipmill.api.loading import load
from clipmill.api.tokenizer import Tokenizer, TokenizerInfo

__all__ = [
    "ClipDataset",
    "Generator",
    "GeneratorInfo",
    "Loader",
    "Samples",
    "Tokenizer",
    "TokenizerInfo",
    "load",
    "open_dataset",
    "write_video",
]
