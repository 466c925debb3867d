"""The parent's end of a decoding child: starts it, exchanges messages, and decides why it died.

Protocol: one line of JSON each way. Requests go to the child's stdin; messages come from a duplicate of its stdout. The
decoders' own output goes to stderr, and the parent keeps the last bytes of it.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import IO, Any

__all__ = ["Child", "DecoderLost", "Limits", "VideoFault"]

_START_SECONDS = 300
"""A busy machine may take this long to start an interpreter."""

_STDERR_TAIL_BYTES = 4096

_OUTSIDE_SIGNALS = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
"""Decoders never raise these signals themselves: an operator, the kernel's OOM killer or a scheduler sent them."""


class DecoderLost(Exception):
    """The environment failed: the child was killed from outside, could not start, or a disk failed."""


class VideoFault(Exception):
    """One attempt failed because of the video."""


@dataclass(frozen=True)
class Limits:
    """Resource limits for one video.

    Attributes:
        cpu_seconds: processor time of the child.
        memory_bytes: address space that the child may use in addition to that at its start.
        no_progress_seconds: a child that delivers no frame for this time is killed.
    """

    cpu_seconds: float
    memory_bytes: int
    no_progress_seconds: float


class Child:
    """The parent's end of one child process.

    Args:
        limits: limits of each request.
        spool: descriptor of a file that both processes use.
        module: the module whose ``serve`` the child runs.
    """

    def __init__(self, limits: Limits, spool: int, module: str = "clipmill.video.worker"):
        program = f"from {module} import serve; serve()"
        arguments = [spool, os.getpid(), limits.memory_bytes, limits.cpu_seconds]
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[spool],
            env={
                **os.environ,
                # The child imports from the same folders as the parent, including a working_dir that Ray added.
                "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
                # NumPy's dot product would keep a thread spinning on every other core: 2.7 times the CPU time on two.
                "OPENBLAS_NUM_THREADS": "1",
            },
            start_new_session=True,  # Ctrl-C reaches the parent only
        )
        self._stdin: IO[bytes] = _pipe(self._process.stdin)
        self._stdout: IO[bytes] = _pipe(self._process.stdout)
        self._stderr: IO[bytes] = _pipe(self._process.stderr)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self._selector.register(self._stderr, selectors.EVENT_READ)
        self._received = b""
        self._printed = b""
        self._is_ready = False
        self.decoder_in_use: str | None = None

    def decode(self, request: dict[str, Any], no_progress_seconds: float) -> list[dict[str, Any]]:
        """Has the child decode one video. Returns the messages of its clips, and last the closing message."""
        if not self._is_ready:
            self._next_message(_START_SECONDS)
            self._is_ready = True
        self._printed, self.decoder_in_use = b"", None
        try:
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            self._explain_death()
        clips = []
        while True:
            message = self._next_message(no_progress_seconds)
            kind = message.pop("kind")
            if kind == "clip":
                clips.append(message)
            elif kind == "done":
                return [*clips, message]
            elif kind == "video_fault":
                raise VideoFault(message["cause"])
            elif kind == "environment_fault":
                raise DecoderLost(message["cause"])
            elif kind == "decoder":
                self.decoder_in_use = message["name"]

    def _next_message(self, patience_seconds: float) -> dict[str, Any]:
        """The child's next message. Raises if it does not come in time or the child died."""
        deadline = time.monotonic() + patience_seconds
        while b"\n" not in self._received:
            remaining_seconds = deadline - time.monotonic()
            if remaining_seconds <= 0:
                self._process.kill()
                if not self._is_ready:
                    raise DecoderLost(f"the decoding child did not start within {patience_seconds:g} s")
                raise VideoFault(f"no progress for {patience_seconds:g} s")
            for key, _ in self._selector.select(remaining_seconds):
                data = os.read(key.fd, 1 << 16)
                if key.fileobj is self._stderr:
                    self._printed = (self._printed + data)[-_STDERR_TAIL_BYTES:]
                    if not data:
                        self._selector.unregister(self._stderr)
                elif data:
                    self._received += data
                else:
                    self._explain_death()
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)

    def _explain_death(self) -> None:
        """Raises `DecoderLost` or `VideoFault`, depending on what ended the child."""
        code = self._process.wait()
        if code >= 0 or not self._is_ready:
            raise DecoderLost(f"the decoding child ended with status {code}: {self.stderr_tail()}")
        if -code in _OUTSIDE_SIGNALS:
            raise DecoderLost(f"the decoding child was killed from outside ({signal.Signals(-code).name})")
        if -code == signal.SIGXCPU:
            raise VideoFault("CPU time limit reached")
        raise VideoFault(f"the decoder crashed ({signal.Signals(-code).name})")

    def stderr_tail(self) -> str:
        """The last bytes that the child printed to stderr; complete once it is dead."""
        os.set_blocking(self._stderr.fileno(), False)
        while data := self._stderr.read(1 << 16):
            self._printed = (self._printed + data)[-_STDERR_TAIL_BYTES:]
        return self._printed.decode(errors="replace").strip()

    def end(self) -> None:
        """Kills the process, reaps it and closes the pipes. It holds no state worth saving."""
        self._process.kill()
        self._process.wait()
        self._selector.close()
        for pipe in (self._stdin, self._stdout, self._stderr):
            try:
                pipe.close()
            except BrokenPipeError:  # an unsent request in the buffer
                continue


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe
