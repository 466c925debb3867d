"""docs/operations.md explains every message of the cluster, the lease and the storage, and no message that is gone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PLACES = ("cluster", "status", "storage", "lease.py", "scratch.py")
ERRORS = {"UserError", "StageFailed", "Interrupted"}
SHORTEST = 10
"""Characters of a message that say something; shorter ones are put together from parts that others name."""


def template(node: ast.expr) -> str:
    """A message with ``{}`` for what differs."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "{}"


def messages() -> list[str]:
    """Templates of all errors that the places raise."""
    found = []
    for place in PLACES:
        path = REPOSITORY / "clipmill" / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
                    found.append(template(node.args[0]))
    return [message for message in found if max(map(len, message.split("{}"))) >= SHORTEST]


def rows() -> list[str]:
    """The messages of the table."""
    return re.findall(
        r"(?m)^\| `(.+?)` \|", (REPOSITORY / "docs" / "operations.md").read_text().split("## Troubleshooting")[1]
    )


def is_about(row: str, message: str) -> bool:
    """Whether a row's text, with ``{}`` for anything, is part of the message."""
    pattern = ".*?".join(re.escape(part) for part in row.split("{}"))
    return re.search(pattern, message) is not None


def test_every_message_is_explained() -> None:
    table = rows()
    assert [message for message in messages() if not any(is_about(row, message) for row in table)] == []


def test_every_row_is_about_a_message() -> None:
    known = messages()
    assert [row for row in rows() if not any(is_about(row, message) for message in known)] == []
