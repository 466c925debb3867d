"""``python -m clipmill`` runs the command ``clipmill``."""

from __future__ import annotations

from clipmill.cli import main

if __name__ == "__main__":
    main()
