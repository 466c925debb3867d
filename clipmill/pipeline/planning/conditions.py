"""Checks that the videos of a plan have the class, actions or text that the configured prior is conditioned on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from clipmill import storage
from clipmill.config import RunConfig
from clipmill.errors import UserError

__all__ = ["check_conditions"]


class _Need(NamedTuple):
    """A condition that every video needs: in a column, or perhaps in a sidecar; and advice for videos without it."""

    key: str
    noun: str
    column: str
    sidecars: str
    advice: str


_LABEL = _Need(
    key="class_conditional=true",
    noun="a class",
    column="label",
    sidecars=r"\.json",
    advice="label every video (data.source), or set prior.model.class_conditional=false",
)
_OF_CONDITION = {
    "actions": _Need(
        key="condition=actions",
        noun="actions",
        column="actions",
        sidecars="",
        advice="name the actions of every video (data.source.actions_suffix), or set prior.model.condition=null",
    ),
    "text": _Need(
        key="condition=text",
        noun="a text",
        column="text",
        sidecars=r"\.json|\.txt",
        advice="give every video a text, or set prior.model.condition=null",
    ),
}


def check_conditions(config: RunConfig, tables: Iterable[pa.Table]) -> None:
    """Refuses videos with which training the prior would certainly fail.

    Sidecars are read later, by the workers. So a video with a sidecar passes, even if the sidecar turns out to have no
    class.

    Args:
        config: config of the run.
        tables: `SOURCE_COLUMNS` of the videos.

    Raises:
        UserError: some videos lack the class, actions or text that the prior needs.
    """
    model = config.prior.model
    needs = [_LABEL] if model.class_conditional else []
    needs += [_OF_CONDITION[model.condition]] if model.condition in _OF_CONDITION else []
    if not needs or config.data.mix:
        return
    num_videos, num_lacking = 0, dict.fromkeys(needs, 0)
    example: dict[_Need, str] = {}
    for table in tables:
        num_videos += table.num_rows
        for need in needs:
            urls = table.filter(_lacks(table, need))["url"]
            num_lacking[need] += len(urls)
            if len(urls):
                example.setdefault(need, urls[0].as_py())
    for need, url in example.items():
        raise UserError(
            f"prior.model.{need.key} needs {need.noun} for every video, and {num_lacking[need]:,} of {num_videos:,} "
            f"have none, such as {storage.shown(url)}; {need.advice}"
        )


def _lacks(table: pa.Table, need: _Need) -> pa.ChunkedArray:
    """bool[n]: True for readable videos without a value, and without a sidecar that may hold one."""
    lacks = pc.and_(pc.is_null(table[need.column]), pc.is_null(table["fault"]))
    if not need.sidecars:
        return lacks
    described = pc.fill_null(pc.match_substring_regex(table["sidecars"], need.sidecars, ignore_case=True), False)
    return pc.and_(lacks, pc.invert(described))
