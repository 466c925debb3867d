from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipmill import storage
from clipmill.errors import UserError


def test_published_objects_are_whole_readable_and_leave_nothing_beside_them(tmp_path):
    url = storage.join(str(tmp_path), "a", "b.bin")
    storage.publish_bytes(url, b"one")
    storage.publish_bytes(url, b"two")
    assert storage.read_bytes(url) == b"two"
    assert os.listdir(tmp_path / "a") == ["b.bin"]
    assert (tmp_path / "a" / "b.bin").stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_neither_the_object_nor_its_beginning(tmp_path):
    with pytest.raises(IsADirectoryError):
        storage.publish_bytes(str(tmp_path), b"a folder is in the way")
    with pytest.raises(FileNotFoundError):
        storage.publish_file(tmp_path / "absent", str(tmp_path / "a" / "b"))
    assert storage.create_bytes(str(tmp_path / "one"), b"1")
    assert not storage.create_bytes(str(tmp_path / "one"), b"2")
    assert [path.name for path in tmp_path.rglob("*")] == ["one"]
    assert not list(tmp_path.parent.glob(f"{storage.TEMPORARY_PREFIX}*"))


def test_publish_file_and_fetch_copy_whole_files(tmp_path):
    original, back = tmp_path / "original", tmp_path / "back"
    original.write_bytes(os.urandom(3 * 2**20 + 1))
    storage.publish_file(original, str(tmp_path / "deep" / "copy"))
    storage.fetch(str(tmp_path / "deep" / "copy"), back)
    assert back.read_bytes() == original.read_bytes()


def _create(url: str, text: str, wins) -> None:
    if storage.create_bytes(url, text.encode()):
        wins.put(text)


def test_of_many_processes_exactly_one_creates(tmp_path):
    context = multiprocessing.get_context("spawn")
    wins = context.Queue()
    url = str(tmp_path / "commits" / "one.json")
    writers = [context.Process(target=_create, args=(url, f"writer {n}", wins)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert storage.read_bytes(url).decode() == wins.get(timeout=5)
    assert wins.empty()


def test_listing_is_sorted_and_skips_what_has_no_content(tmp_path):
    for name in ("b", "a", "c/d", "c/e/f"):
        storage.publish_bytes(str(tmp_path / name), b"x")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert [entry.name for entry in storage.list_folder(str(tmp_path))] == ["a", "b"]
    assert storage.list_folders(str(tmp_path)) == ["c"]
    assert [entry.name for entry in storage.walk(str(tmp_path))] == ["a", "b", "c/d", "c/e/f"]
    assert storage.list_folder(str(tmp_path / "absent")) == []


def test_a_walk_has_the_order_of_keys_and_goes_on_behind_any_name(tmp_path):
    for name in ("a/c", "a-b", "ab", "a.txt", "a/b/x", "a/b-x", "b", "caf\xe9/x", "z"):
        storage.publish_bytes(str(tmp_path / name), b"x")
    names = [entry.name for entry in storage.walk(str(tmp_path))]
    assert names == ["a-b", "a.txt", "a/b-x", "a/b/x", "a/c", "ab", "b", "caf\xe9/x", "z"]
    for place, name in enumerate(names):
        assert [entry.name for entry in storage.walk(str(tmp_path), after=name)] == names[place + 1 :]


def test_links_in_a_circle_end(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "itself").symlink_to("itself")
    (tmp_path / "c").symlink_to("a")
    assert [entry.name for entry in storage.walk(str(tmp_path))] == ["a/b/file", "c/b/file"]


def test_documents_carry_a_schema_and_newer_ones_are_refused(tmp_path):
    url = str(tmp_path / "doc.json")
    storage.publish_document(url, {"b": 1, "a": [2]}, schema=2)
    assert storage.read_document(url, newest_schema=2) == {"schema": 2, "a": [2], "b": 1}
    with pytest.raises(UserError, match="schema 2, this clipmill reads up to 1"):
        storage.read_document(url, newest_schema=1)
    Path(url).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        storage.read_document(url, newest_schema=1)
    with pytest.raises(FileNotFoundError):
        storage.read_document(str(tmp_path / "absent.json"), newest_schema=1)


def test_urls():
    assert storage.join("s3://bucket/a/", "b", "c") == "s3://bucket/a/b/c"
    assert storage.absolute("s3://bucket/a/") == "s3://bucket/a"
    assert storage.absolute("file:///tmp/x") == "/tmp/x"
    assert storage.absolute("runs") == os.path.join(os.getcwd(), "runs")
    assert storage.absolute("S3://Bucket/Key") == "s3://Bucket/Key"
    assert storage.absolute("https://host/list.csv?sig=ab/") == "https://host/list.csv?sig=ab/"
    assert storage.resolve("/base", "https://host/video/") == "https://host/video/"
    assert storage.resolve("/base", "dir/what://is.mp4") == "/base/dir/what://is.mp4"
    assert storage.is_local("runs/demo")
    assert not storage.is_local("s3://bucket")
    with pytest.raises(UserError, match="cannot open nonsense"):
        storage.exists("nonsense://x")


def test_storage_that_needs_more_than_a_url_is_refused_without_a_word_on_the_terminal(monkeypatch):
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with pytest.raises(UserError, match=r"no storage for ftp:.*required argument: 'host'"):
        storage.stat("ftp://127.0.0.1:9/x.mp4")
    gc.collect()
    assert ignored == []


def test_remove_and_remove_tree_accept_what_is_not_there(tmp_path):
    storage.publish_bytes(str(tmp_path / "a" / "b"), b"")
    storage.remove(str(tmp_path / "a" / "absent"))
    storage.remove_tree(str(tmp_path / "a"))
    storage.remove_tree(str(tmp_path / "a"))
    assert not storage.exists(str(tmp_path / "a"))


@given(
    name=st.binary(min_size=1, max_size=30).filter(
        lambda name: not set(name) & set(b"\0/") and name not in (b".", b"..")
    )
)
def test_every_name_on_a_disk_has_a_url_of_its_own(name):
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(name)
        (entry,) = storage.walk(folder)
        assert entry.name.encode()  # is Unicode
        assert storage.read_bytes(storage.join(folder, entry.name)) == name
        assert storage.read_start(storage.resolve(folder, entry.name), 3) == name[:3]
        if name.isascii() and b"\\x" not in name:
            assert entry.name == name.decode()


def test_names_that_look_like_escaped_ones_are_told_from_them(tmp_path):
    names = [b"caf\xe9", b"caf\\xe9", b"caf\\x5cxe9", b"caf\\x5c\xe9"]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(name)
    found = {
        entry.name: storage.read_bytes(storage.join(str(tmp_path), entry.name)) for entry in storage.walk(str(tmp_path))
    }
    assert sorted(found.values()) == sorted(names)
    assert found["caf\\xe9"] == b"caf\xe9"


def test_file_urls_are_percent_encoded(tmp_path):
    (tmp_path / "sp ace.mp4").write_bytes(b"1")
    (tmp_path / "per%20cent.mp4").write_bytes(b"2")
    url = tmp_path.as_uri()
    assert storage.read_bytes(storage.resolve("/elsewhere", f"{url}/sp%20ace.mp4")) == b"1"
    assert storage.read_bytes(f"{url}/per%2520cent.mp4") == b"2"
    assert storage.read_bytes(f"file://localhost{tmp_path}/sp%20ace.mp4") == b"1"
    for url in (f"file:{tmp_path}/sp%20ace.mp4", f"FILE://{tmp_path}/sp%20ace.mp4", f"local://{tmp_path}/sp ace.mp4"):
        assert storage.read_bytes(storage.resolve("/elsewhere", url)) == b"1"
    assert storage.read_bytes(storage.resolve(str(tmp_path), "per%20cent.mp4")) == b"2"
