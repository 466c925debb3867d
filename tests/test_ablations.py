"""The overlays of ``configs/ablations/``: each changes what its name says, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipmill.config import RunConfig, load_config
from clipmill.models.vqvae import codes_shape

CONFIGS = Path(__file__).parents[1] / "configs"
OVERLAYS = {path.stem: path for path in sorted((CONFIGS / "ablations").glob("*.yaml"))}
SETTLED = {"axial-attention-on", "codebooks-1", "codes-1024", "latents-8x32x32", "prior-layers-16"}


def overlaid(base: str, overlay: str) -> RunConfig:
    return load_config([CONFIGS / f"{base}.yaml", OVERLAYS[overlay]])


def shape(config: RunConfig) -> tuple[int, ...]:
    clip = config.data.clip
    return codes_shape(config.vqvae.model, clip.num_frames, clip.size)


def leaves(values: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@pytest.mark.parametrize("base", ["bair", "demo"])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_changes_what_its_name_says(base: str, overlay: str) -> None:
    before, after = load_config([CONFIGS / f"{base}.yaml"]), overlaid(base, overlay)
    what, _, value = overlay.rpartition("-")
    model = after.vqvae.model
    keys = {
        "axial-attention": {"axial_attention"},
        "latents": {"downsample"},
        "codes": {"num_codes"},
        "codebooks": {"num_codebooks"},
        "quantizer": {"quantizer", "num_codes", "fsq_levels", "commitment_cost"},
        "prior-layers": {"num_layers"},
    }[what]
    section = "prior" if what == "prior-layers" else "vqvae"
    old, new = leaves(before.model_dump()), leaves(after.model_dump())
    changed = {key for key in old if old[key] != new[key]}
    assert changed <= {f"{section}.model.{key}" for key in keys}
    found = {
        "axial-attention": "on" if model.axial_attention else "off",
        "latents": "x".join(str(length) for length in shape(after)),
        "codes": str(model.num_codes),
        "codebooks": str(model.num_codebooks),
        "quantizer": model.quantizer,
        "prior-layers": str(after.prior.model.num_layers),
    }
    assert found[what] == value


def test_the_paper_settled_on_what_bair_has() -> None:
    bair = load_config([CONFIGS / "bair.yaml"])
    assert {overlay for overlay in OVERLAYS if overlaid("bair", overlay) == bair} == SETTLED


def test_what_is_compared_has_as_many_codes() -> None:
    assert {overlaid("demo", name).vqvae.model.num_codes for name in OVERLAYS if name.startswith("quantizer")} == {256}
