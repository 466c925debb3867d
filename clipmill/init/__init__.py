"""``clipmill init``: a config for a user's own videos.

`survey_videos` lists the videos and opens some, `choose` picks settings that fit them and this machine, `measure` times
the work of these settings on this machine, and `propose` writes the config file with the reasons as comments.
"""

from __future__ import annotations

from clipmill.init.command import Proposal, propose

__all__ = ["Proposal", "propose"]
