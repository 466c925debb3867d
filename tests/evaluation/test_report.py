from __future__ import annotations

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.evaluation import evaluate, report
from clipmill.evaluation.charts import code_usage_chart, loss_chart, nats_chart
from clipmill.evaluation.film import Film
from clipmill.evaluation.results import METRICS_SCHEMA
from clipmill.video import decode_mp4
from tests.evaluation.toy_run import CLASSES, Unleased, metrics_of, toy_config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a test asks of a page: its tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def write(config: RunConfig) -> tuple[Page, str]:
    report.run(config, Unleased(report.folder_url(config), 1))
    text = storage.read_bytes(config.folder("report", "index.html")).decode()
    return Page(text), text


def test_the_page_plays_every_class_and_shows_the_measured_numbers(config: RunConfig):
    for stage, url in report._stage_folders(config).items():
        summary = {"stage": stage, "seconds": 4.0, "clips": 10, "clips_per_second": 2.5}
        storage.publish_document(storage.join(url, "summary.json"), summary, 1)
    page, _ = write(config)
    films = page.all("video")
    assert len(films) == len(CLASSES)
    for film in films:
        assert film.keys() >= {"muted", "autoplay", "loop", "playsinline"}
        source = film["src"]
        assert source is not None
        prefix, data = source.split(",")
        assert prefix == "data:video/mp4;base64"
        assert decode_mp4(base64.b64decode(data)).shape[0] == 8
    metrics = json.loads(storage.read_bytes(config.folder("evaluation", "default", "metrics.json")))
    for number in (
        metrics["reconstruction"]["nmse"],
        metrics["prior"]["val_nats_per_token"],
        metrics["prior"]["unigram_nats"],
        metrics["prior"]["temporal_bigram_nats"],
        metrics["samples"]["code_total_variation"],
    ):
        assert f"{number:.4g}" in page.text
    for name in CLASSES:
        assert name in page.text
    assert page.text.count("2.5 clips/s") == 6
    assert len([svg for svg in page.all("svg") if svg["class"] == "chart"]) == 4
    assert "num_codes: 16" in page.text  # the configuration
    assert "not there yet" not in page.text.lower()


def test_the_page_needs_nothing_but_itself(config: RunConfig):
    page, text = write(config)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "poster", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!#|&#34;#)|@import", text)
    assert not page.all("link")


def test_what_is_missing_is_shown_as_missing(config: RunConfig):
    shutil.rmtree(Path(config.root, "samples"))
    page, _ = write(config)
    assert "sample: not there yet, run clipmill sample" in page.text
    assert len(page.all("video")) == len(CLASSES)
    for folder in ("evaluation", "prior", "tokens", "vqvae"):
        shutil.rmtree(Path(config.root, folder))
    assert not report.is_finished(config)
    page, _ = write(config)
    assert not page.all("video")
    for stage in ("evaluate", "train-vqvae", "train-prior"):
        assert f"run clipmill {stage}" in page.text
    assert "not run yet" in page.text


def judge_tokenizer(config: RunConfig, **settings: object) -> dict[str, Any]:
    asked = config.evaluate.model_copy(update={"what": "vqvae", **settings})
    asked_of = config.model_copy(update={"evaluate": asked})
    evaluate.run(asked_of, Unleased(evaluate.folder_url(asked_of), 1))
    return metrics_of(asked_of)


def test_a_tokenizer_shows_before_there_is_a_prior(config: RunConfig):
    for folder in ("evaluation", "samples", "prior", "tokens"):
        shutil.rmtree(Path(config.root, folder))
    page, _ = write(config)
    assert "run clipmill evaluate --what vqvae" in page.text
    result = judge_tokenizer(config)
    assert not report.is_finished(config)
    page, _ = write(config)
    for number in ("nmse", "psnr_db", "ssim"):
        assert f"{result['reconstruction'][number]:.4g}" in page.text
    for text in ("7 clips of the split val", "rFVD", "needs evaluate.fvd_weights", "Prior and samples: not there yet"):
        assert text in page.text
    (picture,) = page.all("img")
    data = (picture["src"] or "").removeprefix("data:image/png;base64,")
    assert base64.b64decode(data) == storage.read_bytes(config.folder("evaluation", "vqvae-8", "vqvae.png"))
    assert len(page.all("video")) == len(CLASSES)
    storage.publish_bytes(config.folder("evaluation", "vqvae-8", "vqvae.png"), b"other")
    assert not report.is_finished(config)


def test_all_three_distances_show(config: RunConfig):
    url = config.folder("evaluation", "default", "metrics.json")
    metrics = storage.read_document(url, METRICS_SCHEMA)
    metrics["fvd"] = {
        "rfvd": 12.75,
        "fvd": 98.5,
        "fvd_star": 87.25,
        "num_real": 7,
        "num_samples": 6,
        "is_singular": True,
    }
    storage.publish_document(url, metrics, METRICS_SCHEMA)
    page, _ = write(config)
    for text in ("FVD of 6 samples; FVD* 87.25, rFVD 12.75", "98.5", "only comparable at equal clip counts"):
        assert text in page.text


def test_numbers_of_an_older_clipmill_are_asked_for_again(config: RunConfig):
    url = config.folder("evaluation", "default", "metrics.json")
    metrics = storage.read_document(url, METRICS_SCHEMA)
    del metrics["fvd"], metrics["schema"]
    storage.publish_document(url, metrics, METRICS_SCHEMA - 1)
    page, _ = write(config)
    assert "run clipmill evaluate --what vqvae" in page.text


def test_samples_show_before_anything_is_evaluated(config: RunConfig):
    shutil.rmtree(Path(config.root, "evaluation"))
    page, _ = write(config)
    assert len(page.all("video")) == len(CLASSES)
    assert "real: not there yet, run clipmill evaluate" in page.text


def test_a_report_on_nothing_is_refused(tmp_path: Path):
    config = toy_config(tmp_path / "nothing")
    with pytest.raises(UserError, match="run `clipmill shard`"):
        report.is_finished(config)
    assert not (tmp_path / "nothing").exists()


def test_the_page_is_made_again_only_when_something_changed(config: RunConfig):
    assert not report.is_finished(config)
    _, before = write(config)
    assert report.is_finished(config)
    _, again = write(config)
    assert again == before
    storage.publish_document(config.folder("vqvae", "summary.json"), {"stage": "train-vqvae", "seconds": 1.0}, 1)
    assert not report.is_finished(config)
    write(config)
    assert report.is_finished(config)


def test_names_from_the_data_are_text_not_markup(config: RunConfig):
    evil = '<script>alert("x")</script>'
    root = Path(config.root)
    root.rename(root.with_name("a<b>"))
    config = config.model_copy(update={"root": str(root.with_name("a<b>")), "seed": 3})
    source = config.data.source.model_copy(update={"url": evil})
    config = config.model_copy(update={"data": config.data.model_copy(update={"source": source})})
    page, text = write(config)
    assert evil not in text
    assert evil in html.unescape(text)
    assert not page.all("b>")
    assert len(page.all("script")) == 1


def clip(value: int) -> np.ndarray:
    return np.full((4, 8, 8, 3), value, np.uint8)


def test_a_film_puts_kinds_in_rows_and_clips_in_columns():
    film = Film.of("up", {"real": [clip(0)], "reconstruction": [], "sample": [clip(100), clip(50)]})
    assert film.kinds == ("real", "sample")
    assert film.missing == ("reconstruction",)
    assert film.lengths == (1, 2)
    pixels = decode_mp4(base64.b64decode(film.uri.partition(",")[2]))
    assert pixels.shape == (4, film.size[1], film.size[0], 3)
    (across, right), (down, below) = film.shares(0), film.shares(1)
    assert 2 * across + right == pytest.approx(100)
    assert 2 * down + below == pytest.approx(100)

    def colour(column: int, row: int) -> float:
        x = int(film.size[0] * (column * (across + right) + across / 2) / 100)
        y = int(film.size[1] * (row * (down + below) + down / 2) / 100)
        return float(pixels[2, y - 8 : y + 8, x - 8 : x + 8].mean())

    assert colour(0, 0) == pytest.approx(0, abs=4)
    assert colour(0, 1) == pytest.approx(100, abs=4)
    assert colour(1, 1) == pytest.approx(50, abs=4)
    assert colour(1, 0) == pytest.approx(255, abs=4)  # empty: covered by the page


def test_charts_take_their_colours_from_the_page_and_repeat_exactly():
    records = [{"step": step, "split": "train", "loss": 10.0 / step} for step in range(1, 3000)]
    records += [{"step": 5, "split": "val", "loss": float("nan")}]
    charts = [
        lambda: loss_chart("losses", records, "nats", {"unigram table": 2.0}),
        lambda: code_usage_chart("codes", [5, 3, 0, 0]),
        lambda: nats_chart("nats", {"prior": 1.0, "unigram": 2.0}),
    ]
    for draw in charts:
        drawing = draw()
        assert drawing == draw()
        assert "var(--" in drawing
        assert set(re.findall(r"#[0-9a-f]{6}\b", drawing)) <= {"#000000", "#ffffff"}
        assert len(drawing) < 60_000  # thousands of steps must not make the page heavy


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: nobody looked at the page in a real browser")
def test_a_real_browser_decodes_every_film(config: RunConfig, tmp_path: Path):
    _, text = write(config)
    # The browser writes the whole document out when its virtual time is over; what it saw of the films goes along.
    probe = """<script>setInterval(() => { document.body.dataset.films = JSON.stringify(
        videos.map(v => [v.readyState, v.videoWidth, v.duration, v.error?.code ?? null])
    ); document.body.dataset.refused = refused; }, 50);</script></body>"""
    watch = "<head><script>let refused = 0; addEventListener('securitypolicyviolation', () => refused++);</script>"
    copy = tmp_path / "copy.html"
    copy.write_text(text.replace("<head>", watch, 1).replace("</body>", probe))
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=6000", "--dump-dom", copy.as_uri()]
    document = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    body: dict[str, Any] = next(attributes for attributes in Page(document).all("body"))
    films = json.loads(body["data-films"])
    assert len(films) == len(CLASSES)
    for ready_state, width, duration, error in films:
        assert error is None
        assert ready_state >= 2  # HAVE_CURRENT_DATA: a frame was decoded
        assert width > 100
        assert duration == pytest.approx(1.0, abs=0.05)  # 8 frames at 8 a second
    assert body["data-refused"] == "0"
