"""Processes that read batches ahead of training. They ignore stop signals until the last step is done.

They are spawned, because neither fsspec nor CUDA survives a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Iterator
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from clipmill.errors import ClipmillError

__all__ = ["load_batches"]

STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
PREFETCH_FACTOR = 4
"""Batches that each process holds ready."""


def load_batches(
    source: Dataset[dict[str, Any] | ClipmillError], numbers: range, num_workers: int
) -> Iterator[dict[str, Any]]:
    """Yields batches by number, loaded in this process or ahead in worker processes.

    Args:
        source: collated batches by number; an item may be an error instead, which is raised. It is pickled for the
            workers.
        numbers: numbers of the batches.
        num_workers: worker processes; 0 loads in this process.
    """
    ending = multiprocessing.get_context("spawn").RawValue(ctypes.c_bool, False)
    end = partial(setattr, ending, "value", True)
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_start_worker, ending),
        multiprocessing_context="spawn" if num_workers else None,
        prefetch_factor=PREFETCH_FACTOR if num_workers else None,
        generator=torch.Generator(),  # else the loader draws a seed from the global generator of the training
    )
    # An uncaught error keeps this generator alive; at exit, Python ends the workers by SIGTERM and joins them.
    atexit.register(end)
    try:
        with _stop_signals_blocked():
            batches = iter(loader)  # starts the workers
        for batch in batches:
            if isinstance(batch, ClipmillError):
                raise batch
            yield batch
    finally:
        end()
        atexit.unregister(end)


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Blocks stop signals in processes started inside, so that none dies of one while it still imports torch."""
    resource_tracker.ensure_running()  # started later, it would unblock the signals again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _as_it_is(batch: Any) -> Any:
    """Replaces torch's conversion, because batches are collated already."""
    return batch


def _start_worker(ending: ctypes.c_bool, _: int) -> None:
    """Ignores the signals that stop a training until ``ending``: they reach its whole process group (Ctrl-C, torchrun,
    scancel), and its last checkpoint comes after a step that still needs data.
    """
    torch.set_num_threads(1)  # one thread per worker: the other cores belong to training
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.value else None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
