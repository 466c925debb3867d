"""``clipmill init``: a config for a user's own videos.

`survey` looks at the videos, `choose` turns what it found into a config that this machine can train, `measure` times
that config's work on this machine, and `write_config` writes the file with the reasons beside the keys.
"""

from __future__ import annotations

from clipmill.init.command import Proposal, propose

__all__ = ["Proposal", "propose"]
