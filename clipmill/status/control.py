"""Stops a stage through its storage, which works even where the cluster cannot be reached."""

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
    """Asks a running stage to stop cleanly and waits until it has stopped; yields a line for each event.

    Raises:
        UserError: the stage does not run, or its driver is gone.
    """
    url = folder_of(root, stage)
    claim = read_claim(url)
    if claim is None or claim.is_released or claim.is_alive is False:
        raise UserError(f"{stage} does not run at {storage.shown(url)}; see `clipmill status {storage.shown(root)}`")
    request_stop(url, claim.attempt)
    yield f"asked {claim.stage} on {claim.host} to stop (attempt {claim.attempt}); it checks every 10 s"
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
        f"{stage} does not respond: its heartbeat on {claim.host} has not advanced for {SILENCE_SECONDS:.0f} s. If "
        f"its cluster is gone, free the folder with `clipmill stop --gone {storage.shown(root)}`"
    )


def release_gone(root: str) -> list[str]:
    """Releases the folders of all stages; returns the names of the released stages. Call it if all drivers are gone.

    Without it, the next run watches the heartbeat of a driver on another host for 60 s before it takes over.
    """
    return [stage for stage, url in stage_folders(root).items() if release_lost(url)]
