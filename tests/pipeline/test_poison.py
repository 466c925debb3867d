"""What the internet holds, in one folder: the stage ends by itself, and no good clip is lost or changed."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clipmill.config import RunConfig
from tests.pipeline.corpus import members_of, run_config
from tests.pipeline.judge import judge
from tests.pipeline.poison import NUM_FRAMES, Specimen, write_poison
from tests.pipeline.processes import Job

pytestmark = [pytest.mark.slow, pytest.mark.ci]


class Poisoned:
    """The corpus after the stage has been through it, and the same good films without the bad ones."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source"
        self.specimens = write_poison(self.source)
        self.config = self._run(folder / "run", self.source)
        (folder / "clean").mkdir()
        (folder / "clean" / "good").symlink_to(self.source / "good")
        self.clean = self._run(folder / "clean-run", folder / "clean")
        clips = Path(self.config.folder("clips"))
        lines = (clips / "quarantine.jsonl").read_text().splitlines()
        self.excluded: dict[str, dict[str, Any]] = {entry["url"]: entry for entry in map(json.loads, lines)}
        records = [json.loads(path.read_text()) for path in clips.glob("*/commits/*.json")]
        self.videos: dict[str, dict[str, Any]] = {video["url"]: video for each in records for video in each["videos"]}

    def of(self, *fates: str) -> list[Specimen]:
        return [specimen for specimen in self.specimens if specimen.fate in fates]

    @staticmethod
    def _run(root: Path, source: Path) -> RunConfig:
        config = run_config(
            root,
            source,
            num_workers=2,
            clip={"num_frames": NUM_FRAMES, "resolution": 32},
            max_failed_videos=400,
            cpu_seconds_per_video=4,
            memory_bytes_per_video=2**29,
        )
        with Job(config) as job:
            assert job.wait(timeout_seconds=800) == 0, job.output
            assert job.leaked(patience_seconds=20) == []
            assert job.zombies == set()
        return config


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    return Poisoned(tmp_path_factory.mktemp("poison"))


def test_the_corpus_is_as_bad_as_it_claims_to_be(poisoned: Poisoned) -> None:
    assert len(poisoned.of("excluded", "judged", "short", "unlisted")) >= 200
    kinds = Counter(specimen.kind for specimen in poisoned.specimens)
    assert min(kinds["truncated"], kinds["bit flips"]) >= 50
    assert len(kinds) >= 14


def test_each_bad_file_is_excluded_for_its_true_cause(poisoned: Poisoned) -> None:
    for specimen in poisoned.of("excluded"):
        entry = poisoned.excluded.get(specimen.name, {"cause": "nothing"})
        assert re.search(specimen.cause, entry["cause"]), (specimen, entry)
        assert len(entry["attempts"]) >= 2, entry


def test_a_damaged_file_gives_its_whole_frames_or_is_excluded(poisoned: Poisoned) -> None:
    judged = poisoned.of("judged")
    memory_bytes = poisoned.config.data.memory_bytes_per_video
    verdicts = judge([poisoned.source / specimen.name for specimen in judged], memory_bytes)
    for specimen, verdict in zip(judged, verdicts, strict=True):
        video = poisoned.videos.get(specimen.name)
        entry = poisoned.excluded.get(specimen.name, {"cause": "nothing"})
        if video is None:
            assert re.search(specimen.cause, entry["cause"]), (specimen, verdict, entry)
            nothing_whole = not verdict.num_frames or "frames are damaged" in entry["cause"]
            assert nothing_whole or verdict.complaint in entry["cause"], (specimen, verdict, entry)
            continue
        assert verdict.num_frames, (specimen, verdict, video)
        if video["damaged_frames"]:
            assert 0 < video["num_frames"] <= verdict.num_frames - verdict.num_marked, (specimen, verdict, video)
            assert video["clips"] <= video["num_frames"] // NUM_FRAMES, (specimen, verdict, video)
        else:
            assert (video["num_frames"], verdict.num_marked) == (verdict.num_frames, 0), (specimen, verdict, video)
            assert video["clips"] == verdict.num_frames // NUM_FRAMES or video["joins"], (specimen, verdict, video)


def test_a_file_that_ends_early_is_reported_as_truncated(poisoned: Poisoned) -> None:
    """Where its container has said how long it is."""
    cut = [specimen.name for specimen in poisoned.specimens if specimen.kind == "truncated"]
    shorter = [
        poisoned.videos[name]
        for name in cut
        if name.endswith((".mkv", ".webm", ".avi"))
        and name in poisoned.videos
        and poisoned.videos[name]["num_frames"] < 19
    ]
    assert len(shorter) >= 8
    assert all(video["truncated"] for video in shorter)


def test_short_and_unlisted_files_are_no_failures(poisoned: Poisoned) -> None:
    for specimen in poisoned.of("short"):
        assert poisoned.videos[specimen.name]["short"], specimen
    for specimen in poisoned.of("unlisted"):
        assert specimen.name not in poisoned.videos.keys() | poisoned.excluded.keys(), specimen


def test_every_good_film_is_there_to_the_bit(poisoned: Poisoned) -> None:
    for specimen in poisoned.of("clips"):
        video = poisoned.videos.get(specimen.name)
        assert video is not None, (specimen, poisoned.excluded.get(specimen.name))
        assert video["clips"] == specimen.num_frames // NUM_FRAMES, (specimen, video)
        assert not video["truncated"], (specimen, video)
    clean = members_of(poisoned.clean)
    found = members_of(poisoned.config)
    assert len(clean) == 2 * sum(specimen.num_frames // NUM_FRAMES for specimen in poisoned.of("clips"))  # mp4, json
    assert {key: found.get(key) for key in clean} == clean


def test_nothing_else_is_in_the_quarantine(poisoned: Poisoned) -> None:
    assert poisoned.excluded.keys() <= {specimen.name for specimen in poisoned.of("excluded", "judged")}
    assert poisoned.videos.keys() | poisoned.excluded.keys() == {
        specimen.name for specimen in poisoned.specimens if specimen.fate != "unlisted"
    }
