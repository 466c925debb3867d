"""Stops a stage through its storage, which works even where the cluster cannot be reached."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from clipmill import storage
from clipmill.errors import UserError
from clipmill.lease import SILENCE_SECONDS, Claim, read_claim, release_lost, request_stop
from clipmill.status.places import folder_of, stage_folders
from clipmill.status.read import beats

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

    Without it, the next run watches the heartbeat of a driver on another host for 60 s before it takes over. Here all
    heartbeats are watched together, for 15 s: longer than the pause between two.

    Raises:
        UserError: a driver is alive. No folder has been released.
    """
    claims = {stage: (url, claim) for stage, url in stage_folders(root).items() if (claim := _unreleased(url))}
    with ThreadPoolExecutor(max(1, len(claims))) as pool:
        lives = dict(zip(claims, pool.map(_is_alive, claims.values()), strict=True))
    for stage, (_, claim) in claims.items():
        if lives[stage]:
            raise UserError(
                f"nothing was released: {stage} still runs on {claim.host} (process {claim.pid}, attempt "
                f"{claim.attempt}); stop it with `clipmill stop {storage.shown(root)} {stage}`"
            )
    return [stage for stage, (url, claim) in claims.items() if release_lost(url, claim.attempt)]


def _unreleased(url: str) -> Claim | None:
    claim = read_claim(url)
    return None if claim is None or claim.is_released else claim


def _is_alive(claimed: tuple[str, Claim]) -> bool:
    """Whether the driver that holds a folder is alive, or another one has replaced it."""
    url, claim = claimed
    return beats(url, claim) if claim.is_alive is None else claim.is_alive
