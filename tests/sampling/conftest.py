from __future__ import annotations

from tests.models.conftest import _one_thread_and_fixed_seed

__all__ = ["_one_thread_and_fixed_seed"]
