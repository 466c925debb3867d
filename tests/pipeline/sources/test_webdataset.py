from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmill.config import SourceConfig
from clipmill.errors import UserError
from clipmill.pipeline.sources import list_videos
from clipmill.pipeline.sources.tar import DamagedTar, Member, index_members
from clipmill.pipeline.sources.webdataset import extract
from clipmill.stages import run_stage
from tests.pipeline.corpus import make_plan, video_bytes
from tests.pipeline.sources.fixtures import shard_in_process, source_config

NUM_FRAMES = 9
BLOCK = 512


def source(url: Path, **keys: object) -> dict[str, object]:
    return {"type": "webdataset", "url": str(url), **keys}


def listed(url: Path, **keys: object) -> list[Any]:
    return list(list_videos(SourceConfig.model_validate(source(url, **keys))))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Adds a member as webdataset's writer does, with its own times and owners; returns the offset of its header."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uname, info.gname = len(data), 1_700_000_000, 0o444, "bigdata", "bigdata"
    offset = tar.offset
    tar.addfile(info, io.BytesIO(data))
    return offset


def write_download(folder: Path, num_shards: int = 2, videos_per_shard: int = 2) -> None:
    """What video2dataset leaves: shards of videos with their texts, and statistics and tables beside."""
    folder.mkdir(parents=True)
    for shard in range(num_shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(videos_per_shard):
                index = shard * videos_per_shard + number
                key = f"{shard:05d}{number:04d}"
                meta = {
                    "url": f"https://example.org/{index}",
                    "caption": f"caption {index}",
                    "key": key,
                    "status": "success",
                    "error_message": None,
                    "genre": "news" if index % 2 else "sport",
                    "duration": float("nan"),
                }
                add(tar, f"{key}.mp4", video_bytes(index, NUM_FRAMES))
                add(tar, f"{key}.txt", f"caption {index}".encode())
                add(tar, f"{key}.json", json.dumps(meta, indent=4).encode())
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 2}')
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")


def test_a_download_becomes_clips_with_texts_labels_and_metadata(embedded: None, tmp_path: Path) -> None:
    write_download(tmp_path / "in")
    config = source_config(tmp_path, source(tmp_path / "in", columns={"label": "genre"}))
    summary = run_stage("shard", config)
    assert summary is not None
    assert (summary["videos"], summary["clips"], summary["failed"], summary["classes"]) == (4, 8, 0, 2)
    assert summary["other_files"] == {".json": 2, ".parquet": 2}


def test_a_video_in_a_tar_is_the_same_as_the_video_alone(tmp_path: Path) -> None:
    write_download(tmp_path / "in")
    (tmp_path / "alone" / "sport").mkdir(parents=True)
    (tmp_path / "alone" / "sport" / "x.mp4").write_bytes(video_bytes(3, NUM_FRAMES))
    found = shard_in_process(source_config(tmp_path, source(tmp_path / "in", columns={"label": "genre"})))
    alone = shard_in_process(source_config(tmp_path / "alone", {"url": str(tmp_path / "alone")}))
    clips = {name.split("#")[1].split("@")[0] + name[-2:]: clip for name, clip in found.clips("train").items()}
    assert sorted(clips) == [f"{s:05d}{n:04d}.mp4:{f}" for s in (0, 1) for n in (0, 1) for f in (0, 4)]
    for first in (0, 4):
        np.testing.assert_array_equal(clips[f"000010001.mp4:{first}"], alone.clips("train")[f"sport/x.mp4:{first}"])
    described = {d["source"].split("#")[1][:9]: d for d in found.described("train")}
    assert [(d["text"], d["label"]) for _, d in sorted(described.items())] == [
        ("caption 0", "sport"),
        ("caption 1", "news"),
        ("caption 2", "sport"),
        ("caption 3", "news"),
    ]
    metadata = described["000010001"]["metadata"]
    assert metadata == {
        "url": "https://example.org/3",
        "caption": "caption 3",  # the txt is the text
        "key": "000010001",
        "status": "success",
        "error_message": None,
        "duration": None,
    }


def test_the_members_of_a_key_are_one_sample_and_its_videos_one_group(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for name, data in (
            ("a.b/x.1.left.mp4", b"left"),
            ("a.b/x.1.right.MKV", b"right video"),
            ("a.b/x.json", b'{"title": "both", "n": 3}'),
            ("a.b/y.webm", b"y"),
            ("a.b/.hidden.mp4", b"z"),
            ("a.b/no_suffix", b"z"),
            ("a.b/pictures.jpg", b"z"),
        ):
            add(tar, name, data)
    left, right, other = listed(tmp_path / "one.tar", columns={"text": "title"})
    assert (left.name, left.member, left.bytes) == ("one.tar", "a.b/x.1.left.mp4@0", 4)
    assert (right.member, right.bytes) == ("a.b/x.1.right.MKV@1024", 11)
    assert left.group == right.group != other.group
    assert left.identity != right.identity
    assert left.text == right.text == "both"
    assert (other.member, other.text, other.metadata) == ("a.b/y.webm@3072", None, None)


def test_a_name_that_comes_again_begins_another_sample(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "appended.tar", "w") as tar:  # as tar --append joins shards that count from 0
        for index in range(2):
            add(tar, "000.mp4", video_bytes(index, NUM_FRAMES))
            add(tar, "000.txt", f"text {index}".encode())
    assert [video.text for video in listed(tmp_path)] == ["text 0", "text 1"]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_are_found_where_tarfile_finds_them(tmp_path: Path, tar_format: int) -> None:
    names = ["short.mp4", "d" * 90 + "/" + "n" * 80 + ".mp4"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["l" * 300 + "/" + "ü" * 200 + ".mp4", "trailing.mp4"]
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name in names:
            for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
                info = tarfile.TarInfo(f"{name[:80]}.{kind.decode()}.mp4")
                info.type, info.linkname = kind, "/etc/passwd"
                tar.addfile(info)
            add(tar, name, name.encode())
    with path.open("rb") as file:
        members = list(index_members(file, path.stat().st_size))
        assert [member.name for member in members] == names
        for member in members:
            file.seek(member.data_offset)
            assert file.read(member.bytes) == member.name.encode()


def test_a_json_names_origin_label_and_text(tmp_path: Path) -> None:
    sample = {"text": "a text", "video": 7, "genre": 3.0, "score": float("inf"), "half": "\ud800"}
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for key, values in (
            ("a", sample),
            ("b", {**sample, "caption": ["first", "second"]}),
            ("c", {**sample, "video": 8, "genre": ["x"]}),
            ("d", {**sample, "text": "\ud800"}),
        ):
            add(tar, f"{key}.mp4", b"x")
            add(tar, f"{key}.json", json.dumps(values).encode())
    a, b, c, d = listed(tmp_path / "one.tar", columns={"group": "video", "label": "genre"})
    assert (a.group, a.label, a.text, a.metadata) == ("7", "3", "a text", '{"half": "\\ufffd", "score": null}')
    assert (b.group, b.text) == ("7", "first")
    assert c.fault == "in c.json, a text, label or group is a list, not one value"
    assert "half a character" in d.fault
    with pytest.raises(ValueError, match="columns: webdataset reads only group, label, text; remove the other columns"):
        SourceConfig.model_validate(source(tmp_path, columns={"start": "s"}))


def header(name: str, size: bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    """A header with a right checksum, whatever its size field says."""
    block = bytearray(BLOCK)
    block[: len(name)] = name.encode()
    block[100:108], block[124:136], block[156:157], block[257:265] = b"0000444\0", size.ljust(12, b"\0"), kind, magic
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


END = bytes(2 * BLOCK)
GOOD = header("a.mp4", b"%011o" % 5) + b"video".ljust(BLOCK, b"\0")


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (header("b.mp4", b"\xff" * 12), "is damaged at byte 1024"),  # minus one
        (header("b.mp4", b"\x80" + b"\xff" * 11), "ends within b.mp4"),
        (header("b.mp4", b"77777777777"), "ends within b.mp4: 1024 of 8589934591 bytes"),
        (header("b.mp4", b"-0000000512"), "is damaged at byte 1024"),
        (header("b.mp4", b"99999999999"), "is damaged at byte 1024"),
        (header("././@LongLink", b"%011o" % (2**21), b"L") + bytes(2**21), "extended header at byte 1536 has 2097152"),
        (
            header("x", b"%011o" % 20, b"x") + b"9999999 path=b.mp4\n\0".ljust(BLOCK, b"\0"),
            "extended header .* damaged",
        ),
        (header("x", b"%011o" % 20, b"x") + b"0 path=b.mp4\n".ljust(BLOCK, b"\0"), "extended header .* damaged"),
        (header("x", b"%011o" % 29, b"x") + b"29 size=99999999999999999999\n".ljust(BLOCK, b"\0"), "damaged"),
        (b"garbage".ljust(BLOCK, b"\1"), "is damaged at byte 1024; what follows cannot be read"),
        (header("b.mp4", b"%011o" % 5)[:-8], "the tar ends within the header|ends within b.mp4"),
    ],
)
def test_no_header_makes_the_reader_loop_or_leave_the_file(tmp_path: Path, damage: bytes, cause: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(GOOD + damage + (END if len(damage) >= BLOCK else b""))
    with path.open("rb") as file:
        members = index_members(file, path.stat().st_size)
        assert next(members) == Member("a.mp4", 0, 5, 5)
        with pytest.raises(DamagedTar, match=cause) as error:
            next(members)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("padding", "behind", "names"),
    [
        (0, GOOD + END, ["a.mp4", "a.mp4"]),
        (18 * BLOCK, GOOD + END, ["a.mp4", "a.mp4"]),
        (18 * BLOCK, b"", ["a.mp4"]),
        (0, b"no tar, only what a disk had there".ljust(BLOCK), ["a.mp4"]),
    ],
)
def test_tars_that_were_joined_are_read_to_the_end(
    tmp_path: Path, padding: int, behind: bytes, names: list[str]
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(GOOD + END + bytes(padding) + behind)
    with path.open("rb") as file:
        assert [member.name for member in index_members(file, path.stat().st_size)] == names


@pytest.mark.parametrize("stated", [0, 3, 2**30])
def test_the_size_of_a_pax_record_holds_whatever_the_header_states(tmp_path: Path, stated: int) -> None:
    record = b"13 size=1000\n"
    extended = header("x", b"%011o" % len(record), b"x") + record.ljust(BLOCK, b"\0")
    content = bytes(range(250)) * 4
    data = header("b.mp4", b"%011o" % stated) + content.ljust(2 * BLOCK, b"\0")
    link = extended + header("c.mp4", b"%011o" % stated, b"2")
    path = tmp_path / "x.tar"
    path.write_bytes(extended + data + link + GOOD + END)
    videos = listed(path)
    assert [video.bytes for video in videos] == [1000, 5]
    copy = extract(str(path), videos[0].member, videos[0].bytes, tmp_path)
    assert copy.read_bytes() == content


def test_sparse_files_are_passed_over(tmp_path: Path) -> None:
    old = bytearray(header("s.mp4", b"%011o" % 3, b"S", b"ustar  \0"))
    old[482] = 1  # a further block of its map follows
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    record = b"22 GNU.sparse.major=1\n"
    new = header("x", b"%011o" % len(record), b"x") + record.ljust(BLOCK, b"\0") + header("t.mp4", b"%011o" % 3)
    data = b"xyz".ljust(BLOCK, b"\0")
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(old) + bytes(BLOCK) + data + new + data + GOOD + END)
    with path.open("rb") as file:
        assert [member.name for member in index_members(file, path.stat().st_size)] == ["a.mp4"]


def damaged_corpus(folder: Path) -> dict[str, int]:
    """One tar of four samples; the offsets of their headers by name."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        return {
            f"{number}.{suffix}": add(tar, f"{number}.{suffix}", data)
            for number in range(4)
            for suffix, data in (("mp4", video_bytes(number, NUM_FRAMES)), ("json", b'{"caption": "c"}'))
        }


def in_tar(data: bytearray, offset: int, new: bytes) -> None:
    data[offset : offset + len(new)] = new


@pytest.mark.parametrize(
    ("damage", "kept", "causes"),
    [
        (lambda data, at: in_tar(data, at["1.mp4"] + BLOCK + 40, b"x" * 1500), "023", {"1.mp4": ""}),
        (
            lambda data, at: in_tar(data, at["1.json"] + BLOCK, b"{{"),
            "023",
            {"1.mp4": "the txt or json of 1 cannot be read"},
        ),
        (
            lambda data, at: in_tar(data, at["1.json"] + BLOCK, b'["a", "b", "c"]\n'),
            "023",
            {"1.mp4": "1.json is not a JSON object"},
        ),
        (lambda data, at: in_tar(data, at["2.mp4"], b"x"), "01", {"": "is damaged at byte"}),
        (
            lambda data, at: data.__delitem__(slice(at["2.mp4"] + 2000, None)),
            "01",
            {"2.mp4": "ends within 2.mp4: 1488"},
        ),
        (lambda data, at: data.__delitem__(slice(at["2.json"] + 520, None)), "01", {"2.mp4": "ends within 2.json: 8"}),
        (lambda data, at: data.__delitem__(slice(at["2.json"] + 100, None)), "012", {"": "ends within the header"}),
    ],
)
def test_a_damaged_member_costs_one_video_and_a_damaged_tar_its_rest(
    tmp_path: Path, damage: Callable[[bytearray, dict[str, int]], None], kept: str, causes: dict[str, str]
) -> None:
    offsets = damaged_corpus(tmp_path / "in")
    path = tmp_path / "in" / "00000.tar"
    data = bytearray(path.read_bytes())
    damage(data, offsets)
    path.write_bytes(data)
    found = shard_in_process(source_config(tmp_path, source(tmp_path / "in")))
    assert {name.split("#")[1][0] for name in found.clips("train")} == set(kept)
    excluded = {name.split("#")[1].split("@")[0]: cause for name, cause in found.excluded().items()}
    assert excluded.keys() == causes.keys()
    assert all(cause in excluded[name] for name, cause in causes.items())


def test_a_tar_without_an_end_mark_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    offsets = damaged_corpus(tmp_path / "in")
    path = tmp_path / "in" / "00000.tar"
    path.write_bytes(path.read_bytes()[: offsets["3.mp4"]])
    with caplog.at_level(logging.WARNING):
        assert len(listed(tmp_path / "in")) == 3
    assert "00000.tar: the tar has no end mark" in caplog.text


def test_a_tar_that_changed_after_planning_costs_its_videos(tmp_path: Path) -> None:
    from clipmill.lease import hold
    from clipmill.pipeline.budget import Allowance
    from clipmill.pipeline.unit import make_worker

    damaged_corpus(tmp_path / "in")
    config = source_config(tmp_path, source(tmp_path / "in"))
    plan = make_plan(config)
    path = tmp_path / "in" / "00000.tar"
    path.write_bytes(path.read_bytes()[BLOCK:])
    with hold(config.folder("clips"), "shard") as lease:
        result = make_worker(config, lease, Allowance(10, is_new=False))(plan.unit("train", 0))
    assert result["counts"]["num_clips"] == 0
    assert {e["cause"] for e in result["exclusions"]} == {"the tar changed since it was planned: no video begins there"}


def test_a_compressed_tar_and_a_folder_without_tars_are_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w:gz") as tar:
        add(tar, "a.mp4", b"x" * 2000)
    (video,) = listed(tmp_path / "in")
    assert "is not a tar, or is compressed" in video.fault
    (tmp_path / "in" / "a.tar").rename(tmp_path / "in" / "a.tar.gz")
    with pytest.raises(
        UserError, match=r"holds no video \(in files ending in tar\); it holds 1 .gz; name another folder"
    ):
        listed(tmp_path / "in")
    with pytest.raises(UserError, match="does not exist"):
        listed(tmp_path / "none.tar")
