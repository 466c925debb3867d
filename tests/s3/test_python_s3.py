"""Models, data sets and given files by the URL of a bucket."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clipmill
from clipmill import storage
from clipmill.sampling.files import list_files
from clipmill.video import decode_mp4
from tests.api.conftest import run_root
from tests.evaluation.toy_run import HEIGHT, WIDTH, make_samples, toy_config

__all__ = ["run_root"]

pytestmark = pytest.mark.slow


def test_a_run_in_a_bucket_is_used_as_one_on_a_disk(bucket_url: str, run_root: Path, tmp_path: Path):
    url = f"{bucket_url}/runs/demo"
    for path in run_root.rglob("*"):
        if path.is_file() and path.relative_to(run_root).parts[0] != "samples":
            storage.publish_file(path, f"{url}/{path.relative_to(run_root)}")
    generator = clipmill.load(url, "generator")
    videos, codes = generator.sample(2)
    assert torch.equal(codes, clipmill.load(str(run_root), "generator").sample(2).codes)
    clipmill.write_video(f"{bucket_url}/films/one.mp4", videos[0])
    assert decode_mp4(storage.read_bytes(f"{bucket_url}/films/one.mp4")).shape == videos[0].shape
    there = clipmill.load(url, "tokenizer").encode(f"{bucket_url}/films/one.mp4")
    assert there.shape == codes[0].shape
    dataset = clipmill.open_dataset(url, "tokens", "val", cache_dir=tmp_path / "cache")
    here = clipmill.open_dataset(str(run_root), "tokens", "val")
    assert all(torch.equal(dataset[index]["codes"], here[index]["codes"]) for index in range(len(here)))

    picture = io.BytesIO()
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(picture, "PNG")
    storage.publish_bytes(f"{bucket_url}/films/a.png", picture.getvalue())
    assert [file.name for file in list_files(f"{bucket_url}/films", None, 1).files] == ["a.png", "one.mp4"]
    make_samples(
        toy_config(tmp_path / "unused", prefix_latents=1, given=f"{bucket_url}/films").model_copy(update={"root": url})
    )
    samples = clipmill.open_dataset(url, "samples", cache_dir=tmp_path / "cache")
    assert [samples[index]["meta"]["given"] for index in range(3)] == ["a.png", "one.mp4", "a.png"]
    assert storage.exists(f"{url}/samples/default/preview/grid.mp4")
