"""What a child process does to itself before it reads what may be hostile: it dies with its parent, within limits."""

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
    """Answers requests on stdin until it closes. Arguments: spool descriptor, parent's pid, bytes, CPU seconds.

    Args:
        answer: takes a request (with its ``cpu_seconds``), the spool descriptor, and what sends messages.
    """
    spool, parent, memory_bytes = map(int, sys.argv[1:4])
    cpu_seconds = float(sys.argv[4])
    _die_with(parent)
    # Decoders print to stdout: the messages get a descriptor of their own, and stdout becomes stderr.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _limit_memory(memory_bytes)

    def send(message: dict[str, Any]) -> None:
        # Nobody reads of a clip before its video has ended: no reason to wake the parent for each.
        print(json.dumps(message), file=messages, flush=message["kind"] != "clip")

    send({"kind": "ready"})
    for line in sys.stdin:
        limit_cpu(cpu_seconds)
        answer({**json.loads(line), "cpu_seconds": cpu_seconds}, spool, send)


def _die_with(parent: int) -> None:
    """The kernel kills this process when its parent dies, whatever a decoder is doing then (Linux only)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def _limit_memory(memory_bytes: int) -> None:
    """Limits the address space to ``memory_bytes`` beyond what is mapped now; a crash leaves no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    with open("/proc/self/statm") as statm:
        mapped_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, mapped_bytes + memory_bytes)


def limit_cpu(cpu_seconds: float) -> None:
    """Allows ``cpu_seconds`` more; SIGXCPU ends the process then."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + cpu_seconds))


def _limit(kind: int, soft: int) -> None:
    """Sets a soft limit, as far as the hard one allows."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """``pwrite`` until everything is written: a signal or a nearly full disk cuts it short."""
    view = memoryview(data)
    while view:
        num_written = os.pwrite(descriptor, view, offset)
        view, offset = view[num_written:], offset + num_written
