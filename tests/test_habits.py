"""The checks of `make lint` that are ours find what they are for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("habits", Path(__file__).parents[1] / "tools" / "habits.py")
assert SPEC is not None
assert SPEC.loader is not None
habits = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(habits)


def kinds(source: str) -> list[str]:
    return [kind for kind, _, _ in habits._breaches(source, is_package=True)]


def test_long_functions_and_files():
    body = "    pass\n"
    assert kinds("def f():\n" + 59 * body) == []
    assert kinds("def f():\n" + 60 * body) == ["function"]
    assert kinds("pass\n" * 400) == []
    assert kinds("pass\n" * 401) == ["file"]


def test_riddles_in_names_comments_and_docstrings_but_not_in_code():
    assert kinds("class Told:\n    pass\n") == ["name"]
    assert kinds("def f(left_out):\n    self.remade = 1\n") == ["name", "name"]
    assert kinds("x = tensor.narrow(0, 1, 2)\n") == []
    assert kinds('def f():\n    """Keep the so many\n    best; others are left out."""\n') == ["phrase", "phrase"]
    assert kinds("x = 1  # it is told of it\n") == ["phrase"]
    assert kinds("x = 1  # storage is away, so the run goes on\n") == ["phrase", "phrase"]
    assert kinds('x = "so many"\n') == []
