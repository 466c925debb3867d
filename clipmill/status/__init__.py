"""Status, logs and stop requests of a run, through its storage alone: ``status.json`` and the log of each stage.

`publishing` writes both while a stage runs. `read_run` and `read_log` read them from anywhere, even after the cluster
is gone.
"""

from clipmill.status.control import release_gone, stop
from clipmill.status.lines import formatter
from clipmill.status.log import read_log
from clipmill.status.places import folder_of, stage_folders
from clipmill.status.publish import publishing
from clipmill.status.read import StageStatus, read_run

__all__ = [
    "StageStatus",
    "folder_of",
    "formatter",
    "publishing",
    "read_log",
    "read_run",
    "release_gone",
    "stage_folders",
    "stop",
]
