"""SIGTERM at the ends of a command's life: before its modules are imported, and after its result is complete."""

from __future__ import annotations

import subprocess
import sys

_AT_FIRST_IMPORT = """
import os, signal, sys
import clipmill.cli

class Signals:
    def find_spec(self, name, path=None, target=None):
        if name == "clipmill.cli.command":
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Signals())
"""
_AT_LAST = """
import builtins, os, signal, sys
import clipmill.cli

class Signals:
    kill, getpid = staticmethod(os.kill), staticmethod(os.getpid)

    def __del__(self):
        self.kill(self.getpid(), 15)

builtins.signals = Signals()
"""


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    program += "\nclipmill.cli.main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)


def test_sigterm_before_the_commands_are_imported_is_a_stop() -> None:
    assert _run(_AT_FIRST_IMPORT, "--version").returncode == 75


def test_sigterm_after_the_result_changes_no_status() -> None:
    for arguments, status in ((["--version"], 0), (["shard", "root="], 2)):
        ended = _run(_AT_LAST, *arguments)
        assert ended.returncode == status, ended.stderr
