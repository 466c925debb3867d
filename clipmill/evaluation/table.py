"""The numbers of an evaluation as rows of a table, which the command prints and the report shows.

A result is the document ``metrics.json``; docs/evaluation.md defines every number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clipmill.config import frame_size
from clipmill.evaluation.results import Evaluation

__all__ = [
    "Row",
    "circumstances",
    "fvd_rows",
    "headlines",
    "origin",
    "pixels",
    "prior_rows",
    "row_groups",
    "sample_rows",
    "short",
    "tokenizer_rows",
]

Row = tuple[str, str, str]
"""(name, value, meaning)."""


def short(value: Any) -> str:
    """A number with four significant digits, or with thousands separators."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)  # noqa: RUF001
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def pixels(resolution: int | Sequence[int]) -> str:
    """Size of a clip in words; the axes are named if they differ."""
    height, width = frame_size(resolution)
    return f"{height} x {width} pixels{'' if height == width else ' (height x width)'}"


def circumstances(result: dict[str, Any]) -> str:
    """Describes the clips that were measured. Numbers of other clips are not comparable."""
    clips = result["clips"]
    lowest, highest = clips["fps_lowest"], clips["fps_highest"]
    rate = "unknown fps" if lowest is None else f"{short(lowest)} fps"
    if highest != lowest:
        rate = f"{short(lowest)} to {short(highest)} fps"
    number = short(clips["num_clips"])
    if clips["num_clips"] < clips["num_clips_in_split"]:
        number = f"{number} of {short(clips['num_clips_in_split'])}"
    protocol = result.get("protocol")
    name = f"protocol {protocol['name']}: " if protocol else ""
    return (
        f"{name}{number} clips of the split {clips['split']}, {clips['num_frames']} frames of "
        f"{pixels(clips['resolution'])} at {rate}, fitted by {clips['fit'] or 'an unknown rule'}"
    )


def origin(evaluation: Evaluation) -> str:
    """When, where and with what software an evaluation was made, in one line."""
    made = evaluation.made
    versions = ", ".join(f"{name} {made['versions'][name]}" for name in ("clipmill", "torch"))
    commit = f", commit {made['commit'][:12]}" if made["commit"] else ""
    if made["commit"] and made["commit"].endswith("+changes"):
        commit += " with changes"
    hardware = " and ".join(made["hardware"])
    when = made["at"].replace("T", " ").removesuffix("Z")
    return f"made {when} UTC on {made['host']} ({hardware}) in {short(made['seconds'])} s, {versions}{commit}"


def headlines(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The most important numbers: value, meaning, and section of the result."""
    scores, codes = result["reconstruction"], result["codebook"]
    ssim = "" if scores["ssim"] is None else f"; SSIM {short(scores['ssim'])}"
    used = f"of {short(codes['num_codes'])} codes in use; perplexity {short(codes['perplexity'])}"
    rows = [
        (short(scores["nmse"]), "NMSE of reconstructions (a constant picture: 1)", "reconstruction"),
        (f"{short(scores['psnr_db'])} dB", f"PSNR of reconstructions{ssim}", "reconstruction"),
        (f"{short(round(100 * codes['used_share'], 1))} %", used, "reconstruction"),
    ]
    if "prior" not in result:
        return rows
    prior, samples = result["prior"], result["samples"]
    nats = f"temporal bigram {short(prior['temporal_bigram_nats'])}, unigram {short(prior['unigram_nats'])}"
    rows.append((short(prior["val_nats_per_token"]), f"nats per token of the prior; {nats}", "prior"))
    rows += [(value, meaning, "samples") for value, meaning in _sample_headlines(samples["appearance"])]
    fvd = result["fvd"]
    if fvd:
        others = f"FVD* {short(fvd['fvd_star'])}, rFVD {short(fvd['rfvd'])}"
        rows.append((short(fvd["fvd"]), f"FVD of {short(fvd['num_samples'])} samples; {others}", "samples"))
    return rows


def _sample_headlines(appearance: dict[str, Any]) -> list[tuple[str, str]]:
    """The two most informative numbers about samples that need no network."""
    ratio = appearance["ratio"]
    motion = (f"{short(ratio['motion_energy'])} x", "motion energy of samples over that of real clips")
    if min(appearance[name]["easy_masks"] for name in ("real", "other")) >= 0.5:
        return [motion, (f"{short(ratio['object_variation'])} x", "size changes of objects over those in real clips")]
    return [motion, (f"{short(ratio['flicker_energy'])} x", "flicker of samples over that of real clips")]


def row_groups(result: dict[str, Any]) -> list[list[Row]]:
    """All rows of a result: tokenizer, prior, distances of sets of videos."""
    groups = [tokenizer_rows(result), fvd_rows(result)]
    if "prior" in result:
        groups.insert(1, prior_rows(result))
        groups.insert(2, sample_rows(result))
    return groups


def sample_rows(result: dict[str, Any]) -> list[Row]:
    """Samples compared with real clips, without any network."""
    appearance = result["samples"]["appearance"]
    ratio, distance = appearance["ratio"], appearance["stand_in_distance"]
    easy = short(100 * appearance["other"]["easy_masks"])
    nearest = result["samples"]["nearest"]
    return [
        ("motion", f"{short(ratio['motion_energy'])} x", "the real clips' energy of changes from frame to frame"),
        ("flicker", f"{short(ratio['flicker_energy'])} x", "the real clips' energy of changes that turn back"),
        (
            "object size",
            f"{short(ratio['object_variation'])} x",
            f"its variation; {easy} % of samples have easy masks",
        ),
        ("contrast", f"{short(ratio['pixel_variance'])} x", "the variance of their pixels"),
        ("colours", short(appearance["colour_distance"]), "distance of the histograms, 0 to 1"),
        ("stand-in distance", short(distance), "of pixels and energies in cells; only comparable with itself"),
        *(_nearest_rows(nearest) if nearest else []),
    ]


def _nearest_rows(nearest: dict[str, Any]) -> list[Row]:
    """How close the samples are to the training clips."""
    searched = f"of {short(nearest['num_training'])} training clips"
    return [
        (
            "nearest clip",
            f"{short(nearest['median'])} x",
            f"a validation clip's distance to the nearest {searched}; median",
        ),
        (
            "close samples",
            f"{short(100 * nearest['close_share'])} %",
            "closer to one than 99 % of the validation clips",
        ),
    ]


def tokenizer_rows(result: dict[str, Any]) -> list[Row]:
    """Reconstruction and codebook."""
    scores, codes = result["reconstruction"], result["codebook"]
    several = codes["num_codebooks"] > 1
    mean = ", mean" if several else ""
    return [
        ("NMSE", short(scores["nmse"]), "mean squared error over the variance of the clips' pixels"),
        ("PSNR", f"{short(scores['psnr_db'])} dB", "of the mean squared error over all pixels"),
        (
            "high frequencies",
            short(scores["high_frequency_energy"]),
            "their energy over that of the real clips; below 1 is blur",
        ),
        ("SSIM", short(scores["ssim"]), "mean over frames" + _without(scores["ssim"], "frames of 11 pixels or more")),
        ("LPIPS", short(scores["lpips"]), "mean over frames" + _without(scores["lpips"], "evaluate.lpips_weights")),
        (
            "codes in use",
            f"{short(100 * codes['used_share'])} %",
            f"of {short(codes['num_codes'])}" + (f" in each of {codes['num_codebooks']} codebooks" if several else ""),
        ),
        ("perplexity", short(codes["perplexity"]), "of the codes' frequencies" + mean),
        ("entropy", f"{short(codes['entropy_bits'])} bits", "of one code" + mean),
        (
            "bits per clip",
            short(codes["bits_per_clip"]),
            f"by that entropy; {short(codes['raw_bits_per_clip'])} stored plainly",
        ),
    ]


def fvd_rows(result: dict[str, Any]) -> list[Row]:
    """The Frechet video distances, and the Inception Score if it was measured."""
    fvd = result["fvd"] or {}
    missing = _without(fvd.get("rfvd"), "evaluate.fvd_weights")
    rows = [("rFVD", short(fvd.get("rfvd")), f"real against reconstructions{missing}")]
    networks = result["protocol"]["networks"] if result.get("protocol") else {}
    rows += [(f"network of {key}", "", network["status"]) for key, network in networks.items()]
    if "samples" in result:
        rows += _sample_rows(result["samples"], fvd, missing)
    if fvd.get("is_singular"):
        rows.append(("", "", "only comparable at equal clip counts"))
    return rows


def _sample_rows(result: dict[str, Any], fvd: dict[str, Any], missing: str) -> list[Row]:
    samples = f"{short(result['count'])} samples"
    if result["given_frames"]:
        samples += f" that continue {result['given_frames']} given frames"
    rows = [
        ("FVD", short(fvd.get("fvd")), f"real against {samples}{missing}"),
        ("FVD*", short(fvd.get("fvd_star")), f"reconstructions against {samples}{missing}"),
    ]
    rows += _feature_rows(fvd)
    score = result["inception_score"]
    if score is not None:
        whole = score["num_splits"] == 1
        value = short(score["mean"]) if whole else f"{short(score['mean'])} ± {short(score['std'])}"
        about = f"of {samples}" if whole else f"of {samples}, mean and deviation of {score['num_splits']} parts"
        rows.append(("Inception Score", value, about))
    return rows


def _feature_rows(fvd: dict[str, Any]) -> list[Row]:
    """Further metrics on FVD's features."""
    if "kvd" not in fvd:
        return []
    rows = [("KVD", short(fvd["kvd"]), "kernel distance of the same features")]
    seeds, counts, manifold = fvd["over_seeds"], fvd["by_count"], fvd["manifold"]
    if seeds:
        value = f"{short(seeds['mean'])} ± {short(seeds['deviation'])}"
        draws = f"{len(seeds['values'])} draws of {short(seeds['num_clips'])} clips each"
        rows.append(("FVD over seeds", value, f"of {draws}"))
    if counts:
        meaning = f"of infinitely many clips, by a line over 1 / clips (R² {short(counts['r_squared'])})"
        rows.append(("FVD extrapolated", short(counts["extrapolated"]), meaning))
    if manifold:
        rows += [
            ("precision, recall", f"{short(manifold['precision'])}, {short(manifold['recall'])}", "5 neighbours"),
            ("density, coverage", f"{short(manifold['density'])}, {short(manifold['coverage'])}", "5 neighbours"),
        ]
    return rows


def prior_rows(result: dict[str, Any]) -> list[Row]:
    """The prior, and the tables it has to beat."""
    prior = result["prior"]
    return [
        (
            "prior",
            f"{short(prior['val_nats_per_token'])} nats",
            f"per token; {short(prior['bits_per_dim'])} bits per pixel value",
        ),
        ("temporal bigram", f"{short(prior['temporal_bigram_nats'])} nats", "per token, of a table"),
        ("raster bigram", f"{short(prior['raster_bigram_nats'])} nats", "per token, of a table"),
        ("unigram", f"{short(prior['unigram_nats'])} nats", "per token, of a table"),
    ]


def _without(value: Any, needed: str) -> str:
    return f"; needs {needed}" if value is None else ""
