"""``clipmill``, whose rank 1 stops within its first save, as on a host that is suspended."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from clipmill.cli import main
from clipmill.training.zero.engine import Engine

_save = Engine.save


def _stop_or_save(self: Engine, folder: Path, *arguments: Any) -> None:
    if self.world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    _save(self, folder, *arguments)


if __name__ == "__main__":
    Engine.save = _stop_or_save
    main()
