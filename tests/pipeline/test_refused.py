"""One object's fault or everything's: what a worker makes of a file that its storage does not give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clipmill import storage
from clipmill.config import DataConfig, SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.fetch import ExcludedVideo, fetch_video
from clipmill.pipeline.plan import PlannedVideo
from clipmill.pipeline.sources import list_videos
from clipmill.pipeline.sources.multivideo import KeptFiles, find_files
from clipmill.storage import retries
from tests.pipeline.corpus import make_plan, run_config, video_bytes, write_corpus
from tests.pipeline.sources.fixtures import shard_in_process, source_config
from tests.storage.s3_server import Answer, S3Server
from tests.storage.test_web import ETAG, WebServer, drip

FORBIDDEN = (403, "AccessDenied")


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    server.use(monkeypatch)
    server.objects = {f"raw/{name}.mp4": b"1234" for name in ("a", "b", "c")}
    yield server
    server.stop()


def fetch(source: dict[str, object], url: str, folder: Path) -> None:
    data = DataConfig.model_validate({"source": source})
    video = PlannedVideo("0" * 16, url, 4, None, None, None, None, None, None)
    fetch_video(data, video, folder, KeptFiles(folder / "kept"))


def refuse(*keys: str, answer: Answer = FORBIDDEN):
    return lambda request, _: answer if request.split(" ", 1)[-1] in keys else None


def test_one_forbidden_object_costs_one_video(s3: S3Server, tmp_path: Path) -> None:
    s3.fault = refuse("raw/a.mp4")
    with pytest.raises(ExcludedVideo, match="access denied"):
        fetch({"url": "s3://b/raw"}, "a.mp4", tmp_path)
    assert s3.num_lists() == 1


def test_where_every_object_is_forbidden_the_stage_ends(s3: S3Server, tmp_path: Path) -> None:
    s3.fault = lambda request, _: FORBIDDEN if request.startswith("GET") else None
    with pytest.raises(UserError, match="access denied"):
        fetch({"url": "s3://b/raw"}, "a.mp4", tmp_path)


def test_wrong_credentials_end_the_stage_at_once(s3: S3Server, tmp_path: Path) -> None:
    s3.fault = lambda request, _: (403, "InvalidAccessKeyId")
    with pytest.raises(UserError, match="InvalidAccessKeyId"):
        fetch({"url": "s3://b/raw"}, "a.mp4", tmp_path)
    assert sum(s3.requests.values()) == 1


def test_a_bucket_that_is_gone_ends_the_stage(s3: S3Server, tmp_path: Path) -> None:
    s3.fault = lambda request, _: (404, "NoSuchBucket")
    with pytest.raises(UserError, match="does not exist"):
        fetch({"url": "s3://b/raw"}, "a.mp4", tmp_path)


def test_a_list_may_name_a_bucket_that_is_gone(s3: S3Server, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("url\ns3://gone/x.mp4\ns3://b/raw/b.mp4\n")
    s3.fault = refuse("x.mp4", answer=(404, "NoSuchBucket"))
    with pytest.raises(ExcludedVideo, match="does not exist"):
        fetch({"url": str(tmp_path / "list.csv"), "type": "table"}, "s3://gone/x.mp4", tmp_path)


def test_an_archived_object_costs_one_video(s3: S3Server, tmp_path: Path) -> None:
    s3.classes = {"raw/b.mp4": "GLACIER"}
    with pytest.raises(ExcludedVideo, match="is archived"):
        fetch({"url": "s3://b/raw"}, "b.mp4", tmp_path)


@pytest.mark.parametrize("answer", [(400, "InvalidRequest"), (405, "MethodNotAllowed"), (403, "KMS.Disabled")])
def test_whatever_a_bucket_answers_for_one_object_is_its_fault(s3: S3Server, tmp_path: Path, answer: Answer) -> None:
    s3.fault = refuse("raw/a.mp4", answer=answer)
    with pytest.raises(ExcludedVideo, match=answer[1]):
        fetch({"url": "s3://b/raw"}, "a.mp4", tmp_path)


def test_a_missing_object_costs_one_request(s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(ExcludedVideo, match=r"gone\.mp4 is missing"):
        fetch({"url": "s3://b/raw"}, "gone.mp4", tmp_path)
    assert dict(s3.requests) == {"GET raw/gone.mp4": 1}


def test_forbidden_archived_and_strangely_named_objects_cost_no_other(s3: S3Server, tmp_path: Path) -> None:
    names = ["a.mp4", "/b?c#d.mp4", "e f\n.mp4", "cold.mp4", "denied.mp4"]
    s3.objects = {f"raw/{name}": video_bytes(seed, 8) for seed, name in enumerate(names)}
    s3.classes = {"raw/cold.mp4": "GLACIER"}
    s3.fault = refuse("raw/denied.mp4")
    found = shard_in_process(source_config(tmp_path, {"url": "s3://b/raw", "label": "none"}))
    assert found.excluded().keys() == {"cold.mp4", "denied.mp4"}
    assert {described["source"] for described in found.described("train")} == {"a.mp4", ".//b?c#d.mp4", "e f\\n.mp4"}


@pytest.mark.parametrize("behave", [drip, lambda handler: handler.give(403), lambda handler: handler.give(503)])
def test_look_alikes_that_their_web_server_does_not_send_cost_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behave: Callable[[Any], None]
) -> None:
    """Equal tag and length: only the contents could tell them apart."""
    monkeypatch.setenv(retries.RETRY_SECONDS_VARIABLE, "1")
    retries._wasted_seconds.clear()
    write_corpus(tmp_path, 1, with_bad=False)
    server = WebServer()
    server.behave = lambda handler: handler.give(headers=ETAG) if handler.command == "HEAD" else behave(handler)
    names = [str(path) for path in sorted(tmp_path.rglob("*.mp4"))]
    (tmp_path / "list.csv").write_text("\n".join(["url", *names, f"{server.url}/a.mp4", f"{server.url}/b.mp4"]))
    source = {"type": "table", "url": str(tmp_path / "list.csv")}
    config = run_config(tmp_path / "run", tmp_path, source=source, fetch_seconds=1)
    plan = make_plan(config)
    server.stop()
    assert plan.num_videos == len(names) + 2


def test_messages_hold_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = WebServer()
    server.behave = lambda handler: handler.give(headers=ETAG)
    (tmp_path / "list.csv").write_text("url\n")
    (tmp_path / "a.mp4").write_bytes(b"1234")
    data = DataConfig.model_validate({"source": {"type": "table", "url": str(tmp_path / "list.csv")}})
    signed = f"{server.url}/a.npy?X-Amz-Signature=hidden"
    video = PlannedVideo("0" * 16, "a.mp4", 4, None, None, signed, None, None, None)
    with pytest.raises(ExcludedVideo, match=r"Signature=\*\*\*: not an \.npy file"):
        fetch_video(data, video, tmp_path, KeptFiles(tmp_path / "kept"))
    with pytest.raises(UserError, match=r"list\.csv\?token=\*\*\* has no column"):
        list(list_videos(SourceConfig(type="table", url=f"{server.url}/list.csv?token=hidden")))
    server.stop()


@pytest.mark.parametrize("query", ["?token=a", "?path=a/b"])
def test_a_signed_file_of_videos_is_found_in_its_folder(query: str) -> None:
    server = WebServer()
    server.behave = lambda handler: handler.give(headers=ETAG)
    base, files = find_files(f"{server.url}/raw/x.tar{query}", frozenset((".tar",)), Counter())
    assert [storage.resolve(base, entry.name) for entry in files] == [f"{server.url}/raw/x.tar{query}"]
    server.stop()
