"""``clipmill compare`` and ``clipmill runs``: evaluations and runs side by side."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from clipmill.cli.command import app
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.evaluation import evaluate
from clipmill.evaluation.compare import compare, find_evaluation
from clipmill.evaluation.runs import differences, find_runs
from tests.evaluation.test_report import Page
from tests.evaluation.toy_run import Unleased, make_samples, metrics_of, toy_config


@pytest.fixture
def cold(config: RunConfig) -> RunConfig:
    """The same run with samples at another temperature, evaluated."""
    asked = toy_config(Path(config.root), name="cold", temperature=0.5)
    make_samples(asked)
    evaluate.run(asked, Unleased(evaluate.folder_url(asked), 1))
    return asked


def test_two_temperatures_stand_side_by_side(config: RunConfig, cold: RunConfig):
    found = [find_evaluation(config.folder("evaluation", name)) for name in ("default", "cold")]
    page = Page(compare(found).decode())
    ratios = [metrics_of(one)["samples"]["appearance"]["ratio"]["motion_energy"] for one in (config, cold)]
    for text in (
        "default · cold",
        *(f"{ratio:.4g}" for ratio in ratios),
        f"{ratios[1] - ratios[0]:+.4g}",
        "sample.temperature",
        "drawn from the same noise",
        "7 clips of the split val",
    ):
        assert text in page.text
    films = [figure for figure in page.all("figure") if figure.get("class") == "player"]
    assert len(films) == 2  # five samples, four to a film
    assert all((film["data-src"] or "").startswith("data:video/mp4") for film in films)
    differing = [row for row in page.all("tr") if row.get("class") == "differs"]
    same = len(page.all("tr")) - len(differing)
    assert len(differing) > 3  # numbers of the samples
    assert same > 8  # among them those of the tokenizer, which is one and the same


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"max_clips": 4}, r"evaluate\.max_clips \(None -> 4\)"), ({"what": "vqvae"}, r"evaluate\.what")],
)
def test_what_does_not_compare_is_refused_in_one_line(config: RunConfig, settings: dict[str, object], reason: str):
    other = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"name": "other", **settings})})
    evaluate.run(other, Unleased(evaluate.folder_url(other), 1))
    found = [find_evaluation(evaluate.folder_url(one)) for one in (config, other)]
    with pytest.raises(UserError, match=rf"do not compare: .*{reason}") as refusal:
        compare(found)
    assert "\n" not in str(refusal.value)


def test_a_run_with_several_evaluations_wants_one_named(config: RunConfig, cold: RunConfig):
    with pytest.raises(UserError, match=r"several evaluations \(default, cold\); name one"):
        find_evaluation(config.root)
    shutil.rmtree(evaluate.folder_url(cold))
    assert find_evaluation(config.root).name == "default"
    with pytest.raises(UserError, match="no evaluation at"):
        find_evaluation(config.folder("clips"))


def test_the_commands_print_and_write_where_they_are_told(config: RunConfig, cold: RunConfig, tmp_path: Path):
    urls = [config.folder("evaluation", name) for name in ("default", "cold")]
    page = tmp_path / "deep" / "page.html"
    result = CliRunner().invoke(app, ["compare", *urls, "--out", str(page)])
    assert (result.exit_code, page.exists()) == (0, True), result.output
    result = CliRunner().invoke(app, ["runs", config.root], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for text in ("default", "cold", f"{metrics_of(config)['reconstruction']['nmse']:.4g}", "8 + 8"):
        assert text in result.output


def test_runs_of_a_folder_are_found_and_their_settings_compared(config: RunConfig, tmp_path: Path):
    parent = tmp_path / "runs"
    for name, lr in (("a", 0.1), ("b", 0.2)):
        shutil.copytree(config.root, parent / name)
        root = str(parent / name)
        values = {"root": root, "data": {"url": f"{root}/raw"}, "lr": lr, "cluster": {"num_cpus": lr}}
        (parent / name / "vqvae" / "config.yaml").write_text(yaml.safe_dump(values))
    runs = find_runs([str(parent)])
    assert [run.name for run in runs] == ["a", "b"]
    assert runs[0].steps == {"tokenizer": 8, "prior": 8}
    assert differences(runs) == {"lr": [0.1, 0.2]}
    with pytest.raises(UserError, match="no run at"):
        find_runs([str(tmp_path / "absent")])
