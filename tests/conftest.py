from __future__ import annotations

from hypothesis import settings

settings.register_profile("clipmill", deadline=None)  # machines are shared: seconds say nothing about the code
settings.load_profile("clipmill")
