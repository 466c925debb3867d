"""The pages in a real browser: every control, at three widths, in light and dark."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.evaluation import compare, evaluate, report
from clipmill.evaluation.results import read_evaluation
from tests.evaluation.toy_run import Unleased, make_samples

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: no page was opened")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: no page was opened in a browser")

EVIL = "<img src=x onerror=alert(1)>"
LOOKS = [(390, "dark"), (820, "light"), (1440, "dark"), (1440, "light"), (390, "light"), (820, "dark")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as api:
        running = api.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(evaluated_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report and a comparison of a run in which every class has a name that is markup."""
    from tests.evaluation.toy_run import toy_config

    root = tmp_path_factory.mktemp("pages") / "run"
    shutil.copytree(evaluated_root, root)
    config = toy_config(root)
    cold = toy_config(root, name="cold", temperature=0.5)
    make_samples(cold)
    evaluate.run(cold, Unleased(evaluate.folder_url(cold), 1))
    _rename_classes(config)
    report.run(config, Unleased(report.folder_url(config), 1))
    found = [read_evaluation(config.folder("evaluation", name)) for name in ("default", "cold")]
    page = compare.compare([one for one in found if one is not None])
    storage.publish_bytes(str(root / "compare.html"), page)
    return {"report": root / "report" / "index.html", "compare": root / "compare.html"}


def _rename_classes(config: RunConfig) -> None:
    """Gives the first class of the gallery and of the data an evil name."""
    import numpy as np

    url = config.folder("evaluation", "default", "gallery.npz")
    arrays = dict(np.load(url))
    arrays["labels"] = np.array([EVIL if label == "down" else label for label in arrays["labels"]])
    np.savez_compressed(url, **arrays)
    manifest = config.folder("clips", "train", "manifest.json")
    document = storage.read_document(manifest, 99)
    schema = document.pop("schema")
    document["facts"]["classes"] = [EVIL if name == "down" else name for name in document["facts"]["classes"]]
    storage.publish_document(manifest, document, schema)


def until(page: Any, expression: str) -> None:
    """Waits until an expression holds. The page forbids `wait_for_function`, which evaluates strings inside it."""
    deadline = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Any]:
    """A page in the browser, of which nothing may be complained about on the console."""
    name, width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, accept_downloads=True)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append("a label ran as a script"))
    page.goto(pages[name].as_uri())
    page.locator("main .player").first.scroll_into_view_if_needed()  # films load as they come into view
    until(page, "document.querySelector('.player video').readyState >= 2")
    yield page
    assert complaints == []
    page.close()


@pytest.mark.parametrize("opened", [("report", *look) for look in LOOKS] + [("compare", *LOOKS[0])], indirect=True)
def test_a_page_fits_its_window_and_its_colours(opened: Any):
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.viewport_size["width"]
    beyond = """[...document.querySelectorAll("main *")].filter(one =>
        !one.closest(".stage") && one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML)"""
    assert opened.evaluate(beyond) == []
    dark = opened.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    ground, ink = opened.evaluate(
        """["backgroundColor", "color"].map(name => {
            const rgb = getComputedStyle(document.body)[name].match(/\\d+/g).map(Number);
            return rgb[0] + rgb[1] + rgb[2];
        })"""
    )
    assert (ground < ink) == dark
    assert opened.locator(".plot canvas").count() >= 3


@pytest.mark.parametrize("opened", [("report", 1440, "light"), ("compare", 390, "dark")], indirect=True)
def test_every_control_of_a_player(opened: Any):
    player = opened.locator("main .player").first
    video, output = player.locator("video"), player.locator("output")
    frame = "video => Math.floor(video.currentTime * Number(video.closest('.player').dataset.fps) + 0.01)"
    play = player.locator("[data-do=play]")
    assert play.inner_text() == "Pause"  # it plays from the start
    until(opened, "document.querySelector('main .player video').currentTime > 0")
    play.click()
    at_pause = video.evaluate("video => video.currentTime")
    assert video.evaluate("video => video.paused")
    # Both in one call: a slow machine would see the film at its beginning again.
    click_and_look = "play => { play.click(); return play.closest('.player').querySelector('video').currentTime }"
    assert play.evaluate(click_and_look) == pytest.approx(at_pause, abs=0.01)
    assert not video.evaluate("video => video.paused")
    assert video.evaluate("video => video.loop")  # so no gap between two loops, in which a click is lost
    play.click()
    player.locator("[data-do=scrub]").fill("3")
    assert (video.evaluate(frame), output.inner_text()) == (3, "frame 4 of 8")
    player.locator("[data-do=forward]").click()
    assert video.evaluate(frame) == 4
    player.locator("[data-do=back]").click()
    assert video.evaluate(frame) == 3
    player.locator("[data-do=speed]").select_option(index=0)
    assert video.evaluate("video => video.playbackRate") == 0.25
    with opened.expect_download() as download:
        player.locator("[data-do=download]").click()
    assert download.value.suggested_filename.endswith(".mp4")

    player.focus()
    for key, expected in (("ArrowRight", 4), ("ArrowRight", 5), ("ArrowLeft", 4)):
        opened.keyboard.press(key)
        assert video.evaluate(frame) == expected
    opened.keyboard.press(" ")
    assert not video.evaluate("video => video.paused")
    opened.keyboard.press(" ")
    assert video.evaluate("video => video.paused")

    player.locator("[data-do=enlarge]").click()
    dialog = opened.locator("dialog")
    assert dialog.locator("video").evaluate("video => video.getBoundingClientRect().width") > 0
    opened.keyboard.press("Escape")
    assert not dialog.is_visible()
    player.locator(".cells i").first.click()
    assert dialog.locator(".single .title").inner_text()
    dialog.locator("[data-do=close]").click()
    assert not dialog.is_visible()

    opened.locator("#play-all").click()
    all_paused = opened.evaluate("[...document.querySelectorAll('main video')].every(video => video.paused)")
    opened.locator("#play-all").click()
    assert all_paused or opened.evaluate("[...document.querySelectorAll('main video')].every(video => video.paused)")


@pytest.mark.parametrize("opened", [("compare", 1440, "light"), ("report", 390, "dark")], indirect=True)
def test_charts_hover_zoom_and_choose(opened: Any):
    holder = opened.locator(".plot").first
    holder.scroll_into_view_if_needed()
    over = holder.locator(".u-over")
    box = over.bounding_box()
    assert box is not None
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    values = holder.locator(".u-legend .u-value").all_inner_texts()
    assert any(character.isdigit() for character in "".join(values))  # hovering shows values
    scale = "holder => holder.plot.scales.x.max - holder.plot.scales.x.min"
    whole = holder.evaluate(scale)
    opened.mouse.down()
    opened.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2, steps=4)
    opened.mouse.up()
    assert holder.evaluate(scale) < 0.6 * whole
    holder.locator("xpath=..").locator("[data-do=whole]").click()
    assert holder.evaluate(scale) == whole
    holder.locator(".u-legend .u-series").nth(1).locator("th").click()
    assert holder.evaluate("holder => holder.plot.series[1].show") is False
    boxes = opened.locator(".runs input")
    if boxes.count():
        usage = opened.locator(".plot").nth(2)  # a curve of each evaluation
        boxes.nth(1).uncheck()
        assert usage.evaluate("holder => holder.plot.series.slice(1).map(one => one.show)") == [True, False]


@pytest.mark.parametrize("opened", [("report", 1440, "light")], indirect=True)
def test_a_label_that_is_markup_is_shown_as_text(opened: Any):
    assert opened.locator("h3", has_text=EVIL).count() == 1
    assert opened.locator("main img").count() == 0
