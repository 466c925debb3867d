from __future__ import annotations

import base64
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import UserError
from clipmill.evaluation import evaluate, report
from clipmill.evaluation.charts import Chart, code_usage_chart, loss_chart
from clipmill.evaluation.film import Film, Row
from clipmill.evaluation.pages import place_films
from clipmill.evaluation.results import METRICS_SCHEMA
from clipmill.shards.manifest import Manifest
from clipmill.video import decode_mp4
from tests.evaluation.toy_run import CLASSES, Unleased, make_samples, metrics_of, toy_config, write_tokenizer


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


NUM_FILMS = len(CLASSES) + 3
"""One of each class, those of the worst and the best clips, and that of the samples nearest to training clips."""


def test_the_page_plays_every_class_and_shows_the_measured_numbers(config: RunConfig):
    for stage, url in report._stage_folders(config, report._judged(config)).items():
        summary = {"stage": stage, "seconds": 4.0, "clips": 10, "clips_per_second": 2.5}
        storage.publish_document(storage.join(url, "summary.json"), summary, 1)
    page, _ = write(config)
    films = [figure for figure in page.all("figure") if figure.get("class") == "player"]
    assert len(films) == NUM_FILMS
    for film in films:
        prefix, data = (film["data-src"] or "").split(",")
        assert prefix == "data:video/mp4;base64"
        assert decode_mp4(base64.b64decode(data)).shape[0] == int(film["data-frames"] or 0) == 8
        assert float(film["data-fps"] or 0) == 8  # of the clips themselves
    metrics = metrics_of(config)
    for number in (
        metrics["reconstruction"]["nmse"],
        metrics["prior"]["val_nats_per_token"],
        metrics["prior"]["unigram_nats"],
        metrics["prior"]["temporal_bigram_nats"],
        metrics["samples"]["code_total_variation"],
        metrics["samples"]["appearance"]["ratio"]["motion_energy"],
    ):
        assert f"{number:.4g}" in page.text
    for name in CLASSES:
        assert name in page.text
    assert page.text.count("2.5 clips/s") == 6
    assert len([one for one in page.all("div") if one.get("class") == "plot"]) == 3
    assert "num_codes: 16" in page.text  # the configuration
    assert "not there yet" not in page.text.lower()
    assert not [one for one in page.all("em") if one.get("class") == "stale"]


def test_the_page_needs_nothing_but_itself(config: RunConfig):
    page, text = write(config)
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "poster", "data-src"):
            assert (attributes.get(name) or "#").startswith(("#", "data:"))
    assert not re.search(r"url\((?!#|&#34;#)|@import", text)
    assert not page.all("link")
    assert "Copyright (c) 2022 Leon Sorokin" in text  # what it contains of others comes with its licence


def test_films_beyond_a_few_megabytes_are_fetched_when_they_are_seen():
    row = Row("real", [clip(9)], [8.0], ["a"])
    films = [film for film in (Film.of(str(number), [row]) for number in range(3)) if film is not None]
    size = len(films[0].data)
    placed, files = place_films(films, inline_bytes=2 * size)
    assert [one.src.partition(":")[0] == "data" for one in placed] == [True, True, False]
    assert files == {placed[2].src: films[2].data}
    assert placed[2].src.startswith("media/")


def test_films_of_an_earlier_page_are_removed(config: RunConfig):
    old = config.folder("report", "media", "old.mp4")
    storage.publish_bytes(old, b"film")
    write(config)
    assert not storage.exists(old)


def test_what_is_missing_is_shown_as_missing(config: RunConfig):
    shutil.rmtree(Path(config.root, "samples"))
    page, _ = write(config)
    assert "sample: not there yet, run clipmill sample" in page.text
    assert len(page.all("video")) == NUM_FILMS
    for folder in ("evaluation", "prior", "tokens", "vqvae"):
        shutil.rmtree(Path(config.root, folder))
    assert not report.is_finished(config)
    page, _ = write(config)
    assert not page.all("video")
    for stage in ("evaluate", "train-vqvae", "train-prior"):
        assert f"run clipmill {stage}" in page.text
    assert "not run yet" in page.text


def judge_tokenizer(config: RunConfig) -> dict[str, Any]:
    asked = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"what": "vqvae"})})
    evaluate.run(asked, Unleased(evaluate.folder_url(asked), 1))
    return metrics_of(asked)


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


def test_the_page_says_at_a_number_what_is_stale(config: RunConfig):
    write_tokenizer(config, Manifest.load(config.folder("clips", "train"), "clips"), step=20)
    more = config.model_copy(update={"sample": config.sample.model_copy(update={"num_samples": 6})})
    make_samples(more)
    page, _ = write(config)
    assert "stale: a tokenizer of step 20 is newer than this one of step 8" in page.text
    assert "stale: there are other samples now (6 samples, these numbers are of 5)" in page.text
    judge_tokenizer(config)  # another evaluation: the page goes on to show one, and does not mix them
    page, _ = write(config)
    assert page.text.count("Evaluation default") == 1
    assert "stale: a tokenizer of step 20" in page.text
    assert "vqvae-20" in page.text  # named among the evaluations of the run


def test_what_was_left_out_is_listed_by_cause(config: RunConfig):
    lines = [{"stage": "decode", "cause": "no video stream", "url": f"bad/{number}.mp4"} for number in range(3)]
    quarantine = "\n".join(json.dumps(line) for line in lines)
    storage.publish_bytes(config.folder("clips", "quarantine.jsonl"), quarantine.encode())
    url = config.folder("clips", "train", "manifest.json")
    document = storage.read_document(url, 99)
    schema = document.pop("schema")
    document["facts"] |= {"num_joins": 4, "num_duplicates": 2}
    storage.publish_document(url, document, schema)
    for split in ("train", "val"):
        record_url = config.folder("clips", split, "commits", "000000.json")
        record = storage.read_document(record_url, 99)
        schema = record.pop("schema")
        videos = [{"url": "joined.mp4", "joins": 4}] if split == "train" else []
        storage.publish_document(record_url, {**record, "videos": videos}, schema)
    page, _ = write(config)
    for text in ("quarantined, decode: no video stream", "bad/2.mp4", "joined.mp4 (4)", "copies of a video"):
        assert text in page.text


def test_all_three_distances_show(config: RunConfig):
    url = config.folder("evaluation", "default", "metrics.json")
    metrics = storage.read_document(url, METRICS_SCHEMA)
    schema = metrics.pop("schema")
    metrics["fvd"] = {
        "rfvd": 12.75,
        "fvd": 98.5,
        "fvd_star": 87.25,
        "num_real": 7,
        "num_samples": 6,
        "is_singular": True,
    }
    storage.publish_document(url, metrics, schema)
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
    assert all(script.get("type") in (None, "application/json") for script in page.all("script"))


def clip(value: int, num_frames: int = 4) -> np.ndarray:
    return np.full((num_frames, 8, 8, 3), value, np.uint8)


def brightness(film: Film, frame: int, column: int, row: int) -> float:
    pixels = decode_mp4(film.data)
    assert pixels.shape == (film.num_frames, film.size[1], film.size[0], 3)
    (across, right), (down, below) = film.shares(0), film.shares(1)
    x = int(film.size[0] * (column * (across + right) + across / 2) / 100)
    y = int(film.size[1] * (row * (down + below) + down / 2) / 100)
    return float(pixels[frame, y - 8 : y + 8, x - 8 : x + 8].mean())


def test_a_film_puts_kinds_in_rows_and_clips_in_columns():
    rows = [
        Row("real", [clip(0)], [8.0], ["a"]),
        Row("reconstruction", [], [], []),
        Row("sample", [clip(100), clip(50)], [8.0, 8.0], ["b", "c"]),
    ]
    film = Film.of("up", rows)
    assert film is not None
    assert [row.kind for row in film.rows] == ["real", "sample"]
    assert (film.fps, film.num_frames, film.num_columns) == (8, 4, 2)
    assert brightness(film, 2, 0, 0) == pytest.approx(0, abs=4)
    assert brightness(film, 2, 0, 1) == pytest.approx(100, abs=4)
    assert brightness(film, 2, 1, 1) == pytest.approx(50, abs=4)
    assert brightness(film, 2, 1, 0) == pytest.approx(255, abs=4)  # empty: covered by the page


def test_clips_of_a_film_play_at_their_own_rate_and_wait_at_their_end():
    steps = np.stack([clip(value, 1)[0] for value in (0, 80, 160, 240)])
    film = Film.of("rates", [Row("real", [steps, steps], [4.0, 8.0], ["slow", "fast"], num_given=2)])
    assert film is not None
    assert (film.fps, film.num_frames) == (8, 8)  # the slow one takes a second
    assert [round(brightness(film, frame, 0, 0) / 80) for frame in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [round(brightness(film, frame, 1, 0) / 80) for frame in range(8)] == [0, 1, 2, 3, 3, 3, 3, 3]
    assert film.given_film_frames(film.rows[0]) == 4


def test_charts_are_thinned_and_keep_to_finite_numbers():
    records = [{"step": step, "split": "train", "loss": 10.0 / step} for step in range(1, 3000)]
    records += [{"step": 5, "split": "val", "loss": float("nan")}]

    def series(chart: Chart) -> dict[str, Any]:
        assert chart.data is not None
        return {one["name"]: one for one in chart.data["series"]}

    losses = loss_chart("losses", "", "nats", {(): records}, {"unigram table": 2.0})
    assert set(series(losses)) == {"train", "unigram table"}
    assert len(series(losses)["train"]["xs"]) <= 600  # thousands of steps must not make the page heavy
    assert series(losses)["unigram table"]["ys"] == [2.0, 2.0]
    assert losses.data is not None
    assert losses.data["log"]
    assert series(code_usage_chart({"": [5, 3, 0, 0]}))["codes"]["ys"] == [2.5, 1.5, 0.0, 0.0]
    assert loss_chart("nothing", "", "nats", {(): []}, {}).data is None


def test_the_page_shows_what_a_training_showed(config: RunConfig):
    report.run(config, Unleased(report.folder_url(config), 1))
    assert report.is_finished(config)
    folder = config.folder("prior", "previews")
    for step in range(10, 70, 10):
        storage.publish_bytes(storage.join(folder, f"step-{step:08d}.png"), b"png")
        storage.publish_bytes(storage.join(folder, f"step-{step:08d}.mp4"), b"mp4")
    storage.publish_bytes(config.folder("vqvae", "previews", "step-00000007.png"), b"picture")
    assert not report.is_finished(config)
    page, _ = write(config)
    films = [film["aria-label"] for film in page.all("video") if "at step" in (film["aria-label"] or "")]
    assert films == [f"samples at step {step}" for step in (10, 30, 40, 60)]
    assert [picture["src"] for picture in page.all("img")] == ["data:image/png;base64,cGljdHVyZQ=="]
    assert report.is_finished(config)
