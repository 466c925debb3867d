"""Decodes files with FFmpeg and nothing of the code under test, and says what that gives."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Verdict(NamedTuple):
    """What a plain decode of a file gives.

    Attributes:
        num_frames: all that the decoder gives, also behind damage.
        num_marked: those of them that it calls damaged.
        complaint: its first one, or none.
    """

    num_frames: int
    num_marked: int
    complaint: str


_JUDGE = """
import resource, sys, av
with open("/proc/self/statm") as statm:
    mapped_bytes = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + int(sys.argv[1]), resource.RLIM_INFINITY))
for path in sys.stdin.read().splitlines():
    count, marked, complaint = 0, 0, ""
    try:
        with av.open(path, metadata_errors="replace") as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                complaint = "no video stream" if stream is None else "no decoder knows"
            else:
                stream.codec_context.thread_count = 1
                for packet in container.demux(stream):
                    try:
                        frames = packet.decode()
                    except MemoryError:
                        raise
                    except av.FFmpegError as error:
                        complaint = complaint or error.strerror
                        continue
                    count += len(frames)
                    marked += sum(frame.is_corrupt for frame in frames)
    except MemoryError:
        complaint = "memory limit reached"
    except av.FFmpegError as error:
        complaint = complaint or error.strerror
    print(count, marked, complaint, sep="\\t")
"""


def judge(paths: list[Path], memory_bytes: int) -> list[Verdict]:
    """Decodes files with FFmpeg and nothing else, in a process of its own that may map so many bytes more.

    The limit is the stage's own: a turned bit in an index may ask for gigabytes, and what comes of it (no memory, or
    the end of the file) depends on how many there are.
    """
    names = "\n".join(map(str, paths))
    command = [sys.executable, "-c", _JUDGE, str(memory_bytes)]
    judged = subprocess.run(command, input=names, capture_output=True, text=True, check=True, timeout=600)
    lines = (re.split("\t", line) for line in judged.stdout.splitlines())
    return [Verdict(int(count), int(marked), complaint) for count, marked, complaint in lines]
