"""Charts of the pages, as data for ``page.js``, which draws them with uPlot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Chart", "Curve", "code_usage_chart", "curves_chart", "fvd_chart", "loss_chart"]

_MAX_POINTS = 600
"""Maximum number of points in a curve: more points than pixels only make the page larger."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y), ascending in x."""
    owners: Sequence[str] = ()
    """Names of the evaluations that it belongs to. The page shows it while it shows one of these; if empty, always."""
    colour: int = 0
    dash: int = 0
    """0 solid, 1 dashed, 2 dotted."""
    has_dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart and its text."""

    title: str
    caption: str
    data: dict[str, Any] | None
    """For the page; None if there is no data yet."""
    stage: str = ""
    """The stage that produces the data."""


def curves_chart(title: str, caption: str, x: str, y: str, curves: Sequence[Curve], stage: str = "") -> Chart:
    """A chart of curves. The axis is logarithmic if the smallest value is positive and far below the largest.

    Args:
        title: of the chart.
        caption: text below the title.
        x: name of the horizontal axis.
        y: name of the vertical axis, with its unit.
        curves: a curve without a finite point is not drawn.
        stage: the stage that produces the data.
    """
    drawn = []
    for curve in curves:
        points = [point for point in curve.points if all(map(math.isfinite, point))]
        if points:
            xs, ys = _thinned(np.array(points, np.float64))
            drawn.append((curve, xs, ys))
    if not drawn:
        return Chart(title, caption, None, stage)
    lowest, highest = min(ys.min() for _, _, ys in drawn), max(ys.max() for _, _, ys in drawn)
    data = {
        "x": x,
        "y": y,
        "log": bool(0 < 8 * lowest < highest),  # on a linear axis, the fall of the first steps would flatten the rest
        "series": [
            {
                "name": curve.name,
                "owners": list(curve.owners),
                "colour": curve.colour,
                "dash": curve.dash,
                "points": curve.has_dots,
                "xs": xs.tolist(),
                "ys": ys.tolist(),
            }
            for curve, xs, ys in drawn
        ],
    }
    return Chart(title, caption, data, stage)


def _thinned(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduces points [N, 2] to at most `_MAX_POINTS`, by averaging neighbours."""
    group = -(-len(points) // _MAX_POINTS)
    means = [points[start : start + group].mean(axis=0) for start in range(0, len(points), group)]
    xs, ys = np.array(means).T
    return xs, ys


def loss_chart(
    title: str,
    caption: str,
    unit: str,
    records: Mapping[tuple[str, ...], Sequence[dict[str, Any]]],
    marks: Mapping[str, float],
    stage: str = "",
) -> Chart:
    """Losses over steps, of training (solid) and validation (dotted, with points).

    Args:
        title: of the chart.
        caption: text below the title.
        unit: of the loss.
        records: from `clipmill.metrics.read_metrics`, by the names of their evaluations; () on a page of one.
        marks: losses to show as horizontal lines, by name.
        stage: the stage that trains.
    """
    curves = []
    for number, (owners, rows) in enumerate(records.items()):
        for split, dash in (("train", 0), ("val", 2)):
            points = [(row["step"], row["loss"]) for row in rows if row["split"] == split and "loss" in row]
            name = f"{', '.join(owners)} {split}".strip()
            colour = number if owners else number + dash // 2
            curves.append(Curve(name, points, owners, colour, dash, has_dots=split == "val"))
    steps = [x for curve in curves for x, _ in curve.points]
    if steps:
        ends = (min(steps), max(steps))
        curves += [Curve(name, [(x, value) for x in ends], (), 5, 1) for name, value in marks.items()]
    return curves_chart(title, caption, "step", unit, curves, stage)


def code_usage_chart(counts_of: Mapping[str, Sequence[int]]) -> Chart:
    """How often each code occurs, most frequent first, in multiples of an even share.

    Args:
        counts_of: occurrences of all codes, sorted, by evaluation; one evaluation needs no name ("").
    """
    curves = []
    for number, (name, sorted_counts) in enumerate(counts_of.items()):
        counts = np.array(sorted_counts, np.float64)
        shown = np.unique(np.linspace(0, len(counts) - 1, min(len(counts), _MAX_POINTS)).astype(int))
        multiples = counts / counts.mean()
        points = [(int(code) + 1, float(multiples[code])) for code in shown]
        curves.append(Curve(name or "codes", points, (name,) if name else (), number))
    caption = "How often each code occurs in the clips, most frequent first; 1 is an even share."
    return curves_chart("Codebook", caption, "codes", "times its even share", curves, "evaluate")


def fvd_chart(fits: Mapping[str, dict[str, Any]]) -> Chart:
    """FVD of growing numbers of clips, with the line that was fitted to it over 1 / clips.

    Args:
        fits: section ``fvd.by_count`` of ``metrics.json``, by evaluation; one evaluation needs no name ("").
    """
    curves = []
    for number, (name, fit) in enumerate(fits.items()):
        owners = (name,) if name else ()
        points = [(1 / point["num_clips"], point["fvd"]) for point in reversed(fit["points"])]
        curves.append(Curve(f"{name} FVD".strip(), points, owners, number, has_dots=True))
        ends = [(x, fit["extrapolated"] + fit["slope"] * x) for x in (0.0, points[-1][0])]
        curves.append(Curve(f"{name} fit".strip(), ends, owners, number, 1))
    caption = "Over 1 / clips, where it is close to a line; the fit meets the axis at the FVD of infinitely many clips."
    return curves_chart("FVD by number of clips", caption, "1 / clips", "FVD", curves, "evaluate")
