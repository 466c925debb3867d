"""Every metric that the dashboard shows is one that clipmill exports, and every exported one is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

from clipmill.cluster.metrics import COUNTERS, GAUGES, PREFIX

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"
EXPORTED = {f"ray_{PREFIX}{name}_total" for name in COUNTERS} | {f"ray_{PREFIX}{name}" for name in GAUGES}


def test_the_dashboard_shows_what_is_exported() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {name for expression in expressions for name in re.findall(r"ray_clipmill_\w+", expression)}
    assert shown == EXPORTED
    variables = {variable["name"]: variable["query"] for variable in dashboard["templating"]["list"]}
    for query in (variables["run"]["query"], variables["stage"]["query"]):
        assert set(re.findall(r"ray_clipmill_\w+", query)) <= EXPORTED


def test_labels_are_those_of_the_metrics() -> None:
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel["targets"]:
            [name] = set(re.findall(r"ray_clipmill_(\w+?)(?:_total)?\{", target["expr"])) - {"progress_of"}
            known = {"run", "stage", (COUNTERS | GAUGES)[name].label}
            grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
            assert {label.strip() for labels in grouped for label in labels.split(",")} <= known, panel["title"]
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known, panel["title"]


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    cells = [(x, y) for place in places for x in range(place["x"], place["x"] + place["w"]) for y in [place["y"]]]
    assert len(cells) == len(set(cells))
