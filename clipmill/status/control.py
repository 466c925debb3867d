"""Stops a stage through its storage: works from anywhere, also where the cluster cannot be reached."""

from __future__ import annotations

import time
from collections.abc import Iterator

from clipmill import storage
from clipmill.errors import UserError
from clipmill.lease import SILENCE_SECONDS, Claim, read_claim, release_lost, request_stop
from clipmill.status.places import folder_of, stage_folders

__all__ = ["release_gone", "stop"]

POLL_SECONDS = 2.0


def stop(root: str, stage: str) -> Iterator[str]:
    """Asks a running stage to stop in order, and waits until it has; yields a line for each thing that happens.

    Raises:
        UserError: the stage does not run, or its driver is gone.
    """
    url = folder_of(root, stage)
    claim = read_claim(url)
    if claim is None or claim.is_released or claim.is_alive is False:
        raise UserError(f"{stage} does not run at {storage.shown(url)}; see `clipmill status {storage.shown(root)}`")
    request_stop(url, claim.attempt)
    yield f"asked {claim.stage} on {claim.host} to stop (attempt {claim.attempt}); it looks every 10 s"
    silent_since = time.monotonic()
    while True:
        time.sleep(POLL_SECONDS)
        now = read_claim(url)
        if now is None or now.is_released or now.attempt != claim.attempt or now.is_alive is False:
            yield f"{stage} has stopped; run the same command to go on"
            return
        if now.beat != claim.beat:
            claim, silent_since = now, time.monotonic()
        if time.monotonic() - silent_since > SILENCE_SECONDS:
            raise UserError(_gone(root, stage, claim))


def _gone(root: str, stage: str, claim: Claim) -> str:
    return (
        f"{stage} shows no sign of life: its heartbeat on {claim.host} has stood still for {SILENCE_SECONDS:.0f} s. If "
        f"its cluster is gone, nothing runs there; free the folder with `clipmill stop --gone {storage.shown(root)}`"
    )


def release_gone(root: str) -> list[str]:
    """Releases the folders of all stages whose drivers are gone for good, as the caller knows; the stages released.

    Without it, the next run watches the heartbeat of a driver on another host for 60 s before it takes over.
    """
    return [stage for stage, url in stage_folders(root).items() if release_lost(url)]
