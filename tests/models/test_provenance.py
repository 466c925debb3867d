from __future__ import annotations

import platform

import pytest
import torch

from clipmill.config import ClusterConfig
from clipmill.errors import UserError
from clipmill.models.provenance import make_process_deterministic


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=rf"no GPU on {platform.node()}; .*machine with a GPU.*use_gpu=false") as it:
        make_process_deterministic(ClusterConfig(use_gpu=True))
    assert "\n" not in str(it.value)
    assert make_process_deterministic(ClusterConfig()) == torch.device("cpu")
