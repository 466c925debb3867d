from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from clipmill.training.means import WeightedMeans

ALONE: Any = SimpleNamespace(sum=lambda values: values)


def test_a_mean_weighs_clips_and_not_batches():
    means = WeightedMeans()
    means.add(torch.tensor(3.0), {"loss": torch.tensor(1.0)})
    means.add(torch.tensor(1.0), {"loss": torch.tensor(5.0)})
    assert means.fetch(ALONE) == {"loss": 2.0}


def test_of_no_clips_there_is_no_mean():
    assert WeightedMeans().fetch(ALONE) == {}
