from __future__ import annotations

import hashlib
import io
import itertools
import os
import pickle
import tarfile
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipmill.shards.format import (
    Sample,
    UnitWriter,
    json_bytes,
    npy_bytes,
    parse_npy,
    read_index,
    read_sample,
)
from tests.shards.folders import code_sample, write_parts


def read_part(part):
    shard = memoryview(part.path.read_bytes())
    offsets = read_index(part.index_path.read_bytes()).tolist()
    return [read_sample(shard, *place) for place in itertools.pairwise(offsets)]


def test_samples_come_back_in_order_with_all_members(tmp_path):
    (part,) = write_parts(tmp_path, unit=7, num_samples=5)
    samples = read_part(part)
    assert part.samples == len(samples) == 5
    for clip, (key, members) in enumerate(samples):
        written = code_sample(7, clip)
        assert key == written.key
        assert {member: bytes(content) for member, content in members.items()} == written.members
        assert list(members) == sorted(members)


def test_a_part_is_named_by_its_unit_number_and_hash(tmp_path):
    (part,) = write_parts(tmp_path, unit=12, num_samples=3)
    content = part.path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    assert (part.sha256, part.bytes) == (sha256, len(content))
    assert part.name == part.path.name == f"tokens-000012-00-{sha256[:8]}.tar"
    assert sorted(os.listdir(tmp_path)) == [part.name, part.name + ".idx"]


def test_bytes_depend_on_samples_only(tmp_path, monkeypatch):
    (first,) = write_parts(tmp_path / "first", unit=1, num_samples=4)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    writer = UnitWriter(tmp_path, "tokens", 1, 2**20)
    for clip in range(4):
        sample = code_sample(1, clip)
        writer.add(Sample(sample.key, dict(reversed(sample.members.items()))))
    (second,) = writer.finish()
    assert first.name == second.name
    assert first.path.read_bytes() == second.path.read_bytes()
    assert first.index_path.read_bytes() == second.index_path.read_bytes()


def test_the_bytes_of_the_format_do_not_change_between_versions(tmp_path):
    """Declare a change of this hash in the CHANGELOG: a resumed run would write other shards than it began with."""
    writer = UnitWriter(tmp_path, "clips", 0, 2**20)
    writer.add(Sample("0123456789abcdef_000000", {"mp4": b"video", "json": json_bytes({"label": None, "fps": 25.0})}))
    (part,) = writer.finish()
    assert part.sha256 == "690d9a8558dd033c60ed56fd5a64077c4ae45cda171bec4dc782b064827693c0"


def test_tar_headers_carry_no_time_and_no_owner(tmp_path):
    (part,) = write_parts(tmp_path, unit=1, num_samples=2)
    with tarfile.open(part.path) as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
            assert info.mode == 0o444
    assert part.path.read_bytes()[257:265] == b"ustar\x0000"


def test_parts_close_at_shard_bytes_and_lose_nothing(tmp_path):
    whole, *none = write_parts(tmp_path / "whole", 3, 20)
    assert not none
    parts = write_parts(tmp_path / "parts", 3, 20, shard_bytes=8192)
    assert len(parts) > 2
    assert [part.name[:16] for part in parts] == [f"tokens-000003-{n:02d}" for n in range(len(parts))]
    for part in parts[:-1]:
        offsets = read_index(part.index_path.read_bytes())
        assert offsets[-2] < 8192 <= offsets[-1]
    assert [key for part in parts for key, _ in read_part(part)] == [key for key, _ in read_part(whole)]


@pytest.mark.parametrize("num_samples", range(1, 24))
def test_a_small_rest_is_no_part_of_its_own(tmp_path, num_samples):
    (whole,) = write_parts(tmp_path / "whole", 3, num_samples)
    parts = write_parts(tmp_path / "parts", 3, num_samples, shard_bytes=8192)
    assert sorted(os.listdir(tmp_path / "parts")) == sorted(
        name for part in parts for name in (part.name, part.index_path.name)
    )
    ends = [int(read_index(part.index_path.read_bytes())[-1]) for part in parts]
    assert len(parts) == 1 or min(ends) >= 4096
    assert sum(part.samples for part in parts) == num_samples
    assert [key for part in parts for key, _ in read_part(part)] == [key for key, _ in read_part(whole)]
    # A part that a rest was appended to is what a writer makes that closes it there.
    last = [key for key, _ in read_part(parts[-1])]
    (tmp_path / "again").mkdir()
    writer = UnitWriter(tmp_path / "again", "tokens", 3, 2**20)
    for clip in range(num_samples - len(last), num_samples):
        writer.add(code_sample(3, clip))
    (again,) = writer.finish()
    assert (again.sha256, again.bytes) == (parts[-1].sha256, parts[-1].bytes)
    assert again.index_path.read_bytes() == parts[-1].index_path.read_bytes()


def test_a_unit_without_samples_has_no_parts(tmp_path):
    assert UnitWriter(tmp_path, "clips", 0, 100).finish() == []


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a.b", {"json": b"{}"}), "key 'a.b'"),
        (Sample("", {"json": b"{}"}), "key ''"),
        (Sample("a", {}), "no members"),
        (Sample("a", {"_meta": b""}), "member name '_meta'"),
        (Sample("a" * 96, {"json": b"{}"}), "longer than the 100 characters"),
    ],
)
def test_what_ustar_or_webdataset_cannot_hold_is_refused(tmp_path, sample, message):
    with pytest.raises(ValueError, match=message):
        UnitWriter(tmp_path, "clips", 0, 100).add(sample)


def test_the_longest_name_fits(tmp_path):
    writer = UnitWriter(tmp_path, "clips", 0, 2**20)
    writer.add(Sample("a" * 95, {"json": b"{}"}))
    assert read_part(writer.finish()[0])[0][0] == "a" * 95


def test_a_key_comes_once_in_a_unit(tmp_path):
    writer = UnitWriter(tmp_path, "clips", 0, 1)
    writer.add(Sample("a", {"json": b"{}"}))
    with pytest.raises(ValueError, match="have the key a"):
        writer.add(Sample("a", {"json": b"{}"}))


def test_reading_copies_no_content(tmp_path):
    (part,) = write_parts(tmp_path, 1, 1)
    shard = part.path.read_bytes()
    offsets = read_index(part.index_path.read_bytes()).tolist()
    _, members = read_sample(memoryview(shard), *offsets)
    assert all(content.obj is shard for content in members.values())
    assert np.shares_memory(parse_npy(members["codes.npy"]), np.frombuffer(shard, np.uint8))


def test_offsets_that_do_not_fit_the_tar_are_refused(tmp_path):
    (part,) = write_parts(tmp_path, 1, 3)
    shard = memoryview(part.path.read_bytes())
    zero, one, two, _ = read_index(part.index_path.read_bytes()).tolist()
    for start, end in [(zero, one + 512), (zero + 512, one), (zero, two), (zero, len(shard)), (one, one), (0, 2**40)]:
        with pytest.raises(ValueError, match=r"sample|header"):
            read_sample(shard, start, end)


@pytest.mark.parametrize("offsets", [[], [512, 1024], [0, 512, 512], [0, 1000], [0, 1024, 512]])
def test_a_senseless_index_is_refused(offsets):
    with pytest.raises(ValueError, match="index"):
        read_index(np.array(offsets, "<u8").tobytes())
    with pytest.raises(ValueError, match="cut short"):
        read_index(np.array([0, 512], "<u8").tobytes()[:-1])


@given(
    hnp.arrays(
        st.sampled_from(["u1", "<u2", ">u2", "<i8", "<f4", "<f2", "?", "<c8"]),
        hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
    )
)
def test_npy_round_trip(array):
    data = npy_bytes(array)
    read = parse_npy(data)
    np.testing.assert_array_equal(read, array)
    assert read.shape == array.shape
    assert read.dtype == array.dtype.newbyteorder("<")
    assert not read.flags.writeable
    assert not parse_npy(bytearray(data)).flags.writeable


def test_fortran_order_is_understood():
    array = np.asfortranarray(np.arange(6).reshape(2, 3))
    path_bytes = _numpy_save(array)
    assert b"'fortran_order': True" in path_bytes
    np.testing.assert_array_equal(parse_npy(path_bytes), array)


def test_npy_files_that_are_cut_or_pickled_are_refused():
    class Trap:
        def __reduce__(self):
            return os.abort, ()

    whole = npy_bytes(np.arange(6))
    pickled = _numpy_save(np.array([1, None], dtype=object))
    trap = pickled[: pickled.index(b"\n") + 1] + pickle.dumps(Trap())
    structured = _numpy_save(np.zeros(2, [("a", "<u2")]))
    for data in (b"", whole[:-1], whole + b"x", whole[:9], whole[:60], b"PK" + whole, pickled, trap, structured):
        with pytest.raises(ValueError, match="npy"):
            parse_npy(data)


def _numpy_save(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_json_has_one_form():
    assert json_bytes({"b": 1, "a": ["é", None]}) == b'{"a":["\\u00e9",null],"b":1}'
    with pytest.raises(ValueError, match="JSON"):
        json_bytes({"a": float("nan")})


@pytest.mark.parametrize("size", [b"-0000001130", b"+0000000130", b"0_000000130", b"           ", b"00000000009"])
def test_a_size_that_is_no_octal_number_ends_the_reading(size):
    header = bytearray(512)
    header[:9], header[124:135], header[156:157], header[257:262] = b"a_0.json\0", size, b"0", b"ustar"
    with pytest.raises(ValueError, match=r"no size|invalid literal"):
        read_sample(memoryview(bytes(header) + bytes(512)), 0, 1024)
