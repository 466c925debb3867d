from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from clipmill import scratch
from clipmill.errors import UserError
from clipmill.scratch import ScratchFolder, private_folder, sweep


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this process and of its children."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def hold_a_folder() -> tuple[subprocess.Popen[str], Path]:
    """A process with a folder of its own that has a file in it."""
    code = "from clipmill.scratch import ScratchFolder; import time; folder = ScratchFolder('shard')\n"
    code += "(folder.path / 'clips.tar').touch(); print(folder.path, flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_folder_is_private_and_ends_with_its_block(temporary: Path) -> None:
    with ScratchFolder("shard") as folder:
        assert folder.parent == temporary
        assert folder.name.startswith("clipmill-shard-")
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "inner").mkdir()
    assert list(temporary.iterdir()) == []


def test_a_sweep_removes_what_a_killed_process_left_and_nothing_else(temporary: Path) -> None:
    alive, kept = hold_a_folder()
    dead, left = hold_a_folder()
    kill(dead)
    unknown = temporary / "clipmill-shard-of-somebody"
    unknown.mkdir()
    for path in (kept, left, unknown):
        os.utime(path, (0, 0))  # age says nothing
    try:
        with ScratchFolder("plan") as own:
            sweep()
            assert sorted(temporary.iterdir()) == sorted([kept, unknown, own])
            assert (kept / "clips.tar").exists()
    finally:
        kill(alive)


def test_the_first_folder_of_a_process_sweeps(temporary: Path) -> None:
    dead, left = hold_a_folder()
    kill(dead)
    other, _ = hold_a_folder()
    assert not left.exists()
    kill(other)


def test_folders_of_another_host_stay(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead, left = hold_a_folder()
    kill(dead)
    _, host = scratch._machine()
    monkeypatch.setattr(scratch, "_machine", lambda: ("another0", "machine0"))
    sweep()
    assert left.exists()
    monkeypatch.setattr(scratch, "_machine", lambda: ("rebooted", host))
    sweep()
    assert not left.exists()


def test_a_link_in_the_place_of_a_folder_is_not_followed(temporary: Path) -> None:
    dead, left = hold_a_folder()
    kill(dead)
    precious = temporary / "precious"
    left.rename(precious)
    left.symlink_to(precious)
    sweep()
    assert (precious / "clips.tar").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_folders_of_other_users_are_neither_swept_nor_used(temporary: Path) -> None:
    dead, left = hold_a_folder()
    kill(dead)
    os.chown(left, 65534, 65534)
    sweep()
    assert left.exists()
    os.chown(private_folder(), 65534, 65534)
    with pytest.raises(UserError, match="is not a folder of this user"):
        private_folder()


def test_a_private_folder_is_made_once_and_refused_where_others_could_have_written(temporary: Path) -> None:
    folder = private_folder()
    assert private_folder() == folder == temporary / f"clipmill-{os.getuid()}"
    folder.chmod(0o755)
    assert private_folder().stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"is open to other users and cannot be trusted; remove it, or set TMPDIR"):
        private_folder()
    folder.rmdir()
    folder.symlink_to(temporary)
    with pytest.raises(UserError, match="is not a folder of this user"):
        private_folder()


def test_folders_survive_sweeps_at_the_moment_of_their_making(temporary: Path) -> None:
    code = "from clipmill.scratch import sweep\nwhile True: sweep()"
    sweeper = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(0.5)
        for _ in range(300):
            with ScratchFolder("shard") as folder:
                (folder / "file").touch()
                assert (folder / "file").exists()
        assert sweeper.poll() is None
    finally:
        sweeper.kill()
        sweeper.wait()
