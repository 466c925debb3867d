"""What a node of two costs on which everything fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import environment

pytestmark = [pytest.mark.slow, pytest.mark.ci, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    script = Path(__file__).with_name("two_nodes.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment(), timeout=960, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("full disk", "units fail there that succeed elsewhere, at last: OSError: [Errno 28] No space left on device"),
        ("no route", "units fail there that succeed elsewhere, at last: no such bucket; name another"),
        ("no library", "no worker can start there, at last: data.decoder=decord, which is not installed: pip install "),
        ("broken library", "no worker can start there, at last: ImportError: libx.so: cannot open shared object file"),
    ],
)
def test_a_sick_node_is_named_once_and_costs_no_unit(results: dict[str, Any], what: str, why: str) -> None:
    result = results[what]
    assert result["error"] is None
    assert len(result["done"]) == result["num_units"]
    assert set(result["done"].values()) == {"head"}
    verdicts = [line for line in result["lines"] if "gets no more units" in line]
    assert len(verdicts) == 1
    assert why in verdicts[0]
    after = result["lines"][result["lines"].index(verdicts[0]) + 1 :]
    assert len(after) <= 1  # of a unit that ran there at that moment


def test_a_user_error_ends_the_stage_once_it_is_raised_on_both_nodes(results: dict[str, Any]) -> None:
    result = results["user error"]
    assert re.fullmatch(r"UserError: no such folder; name another \(on \S+ \([0-9a-f]{56}\)\)", result["error"])
    assert not [line for line in result["lines"] if "gets no more units" in line]


def test_workers_keep_off_a_spared_head(results: dict[str, Any]) -> None:
    assert set(results["spare head"]["done"].values()) == {"other"}
