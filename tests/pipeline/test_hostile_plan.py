"""Plans that somebody else wrote: no path in them leaves their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipmill.errors import UserError
from clipmill.pipeline.plan import load_plan
from tests.pipeline.corpus import make_plan, run_config, write_corpus


@pytest.mark.parametrize(
    "changed",
    [
        {"file": "../../../gen-0000-00000000.parquet"},
        {"file": "/etc/passwd"},
        {"file": "gen-0000-00000000.parquet\n"},
        {"file": 7},
        {"sha256": "0" * 63},
        {"kind": "stolen"},
        {"units": {"train": -1, "val": 0}},
        {"units": {"train": 1, "../val": 0}},
        {"videos": True},
        {"duplicates": None},
    ],
)
def test_a_generation_of_another_form_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    write_corpus(tmp_path / "source", 1, with_bad=False)
    config = run_config(tmp_path / "run", tmp_path / "source")
    make_plan(config)
    path = Path(config.folder("clips", "plan", "gen-0000.json"))
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(UserError, match=r"gen-0000\.json is damaged"):
        load_plan(config)
