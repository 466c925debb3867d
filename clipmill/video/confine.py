"""Limits that a child process sets on itself before it reads untrusted files: CPU, memory, end with its parent."""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["SendMessage", "limit_cpu", "serve", "write_all"]

SendMessage = Callable[[dict[str, Any]], None]
"""Sends one message to the parent."""

_PR_SET_PDEATHSIG = 1


def serve(answer: Callable[[dict[str, Any], int, SendMessage], None]) -> None:
    """Answers requests on stdin until it closes.

    The command line gives the spool descriptor, the parent's pid, the memory limit in bytes and the CPU limit in
    seconds.

    Args:
        answer: called with a request (``cpu_seconds`` included), the spool descriptor, and a function that sends
            messages.
    """
    spool, parent, memory_bytes = map(int, sys.argv[1:4])
    cpu_seconds = float(sys.argv[4])
    _die_with(parent)
    # Decoders print to stdout, so messages get their own descriptor and stdout is redirected to stderr.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _limit_memory(memory_bytes)

    def send(message: dict[str, Any]) -> None:
        # The parent uses clip messages only after the video has ended, so they need not be flushed one by one.
        print(json.dumps(message), file=messages, flush=message["kind"] != "clip")

    send({"kind": "ready"})
    for line in sys.stdin:
        limit_cpu(cpu_seconds)
        answer({**json.loads(line), "cpu_seconds": cpu_seconds}, spool, send)


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, even in the middle of a decoder call (Linux only)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call
        os._exit(1)


def _limit_memory(memory_bytes: int) -> None:
    """Limits the address space to what is mapped now plus ``memory_bytes``, and disables core files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    with open("/proc/self/statm") as statm:
        mapped_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, mapped_bytes + memory_bytes)


def limit_cpu(cpu_seconds: float) -> None:
    """Allows ``cpu_seconds`` from now on; then SIGXCPU ends the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + cpu_seconds))


def _limit(kind: int, soft: int) -> None:
    """Sets a soft limit, at most the hard one."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Repeats ``pwrite`` until everything is written; a signal or a nearly full disk can cut a single call short."""
    view = memoryview(data)
    while view:
        num_written = os.pwrite(descriptor, view, offset)
        view, offset = view[num_written:], offset + num_written
