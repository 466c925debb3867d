"""Section ``data.source``: where the raw videos are."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from clipmill.config.section import FREE, PLACE, Section

__all__ = ["SourceConfig", "TableColumns"]


class TableColumns(Section):
    """Column names of a table of videos. None: the table has no such column. All other columns become metadata."""

    url: str = "url"
    """Absolute path or URL of the file, or relative to the table's folder."""
    label: str | None = None
    """Class of the video. An empty cell: no class."""
    text: str | None = None
    """Text of the video, such as a caption. An empty cell: no text."""
    actions: str | None = None
    """Path or URL of a ``.npy`` file of actions, in the format of ``actions_suffix``. An empty cell: no actions."""
    split: str | None = None
    """``train`` or ``val`` (also ``valid``, ``validation``, ``test``; any case). An empty cell: a hash decides."""
    start: str | None = None
    """Start of the video in seconds after the file's first frame. An empty cell: the first frame."""
    end: str | None = None
    """End of the video in seconds after the file's first frame. An empty cell: the end of the file."""
    group: str | None = None
    """Origin of the video, such as a recording: all videos of a group are in the same split. An empty cell: each file
    is a group."""


class SourceConfig(Section):
    """Where the raw videos are: ``docs/sources.md`` shows each type. Keys that belong to another type are refused."""

    type: Literal["folder", "table", "webdataset", "lerobot", "arrays", "hdf5", "bair", "ucf101", "tgif"] = "folder"
    """How the videos are stored."""
    url: Annotated[str, FREE, PLACE] = ""
    """Folder or bucket prefix, which is searched recursively; for ``table`` and ``hdf5`` a file; for ``webdataset`` and
    ``arrays`` either. Not part of the identity: a corpus may move."""
    label: Literal["parent_folder", "none"] = "parent_folder"
    """``folder`` only: class of a video. ``parent_folder``: the name of the folder that holds the file; files directly
    under ``url`` have no class. ``none``: no classes. A ``label`` in a sidecar wins."""
    sidecars: tuple[Literal["txt", "json"], ...] = ("txt", "json")
    """``folder`` only: which files beside ``x.mp4`` describe it. ``x.txt`` holds its text. ``x.json`` holds an object
    with its ``caption`` or ``text`` and its ``label``; all other keys become metadata. An empty list reads no
    sidecars."""
    group: Literal["none", "parent_folder"] = "none"
    """``folder`` only. ``parent_folder``: videos of one folder share an origin, so they are in the same split.
    ``none``: each video is split on its own."""
    actions_suffix: str | None = None
    """``folder`` only: suffix of the files of actions. With ``.actions.npy``, ``x.actions.npy`` beside ``x.mp4`` holds
    the video's actions, float32 [num_frames, action_dim], and each clip gets the actions of its frames. A video without
    such a file has no actions. None reads no actions."""
    columns: TableColumns = TableColumns()
    """Column names for ``table``. For ``webdataset``, ``label``, ``group`` and ``text`` name keys of the ``json``
    members (``text`` of None reads ``caption``, or else ``text``)."""
    actions: tuple[str, ...] | None = None
    """``lerobot``: columns that are concatenated to the actions of a frame, such as ``[action, observation.state]``.
    ``arrays``: arrays of the ``.npz`` files. None uses ``action`` if it exists; an empty list reads no actions."""
    cameras: tuple[str, ...] = ()
    """``lerobot`` only: keys of the cameras, such as ``[observation.images.top]``. An empty list uses all cameras
    except depth maps."""
    axes: str | None = None
    """``arrays`` only: one letter for each axis: N videos, T frames, H rows, W columns, C channels. ``TNHW`` is the
    layout of Moving MNIST. None accepts ``THW``, ``THWC`` and ``NTHWC`` where the shape is unambiguous."""
    array_key: str | None = None
    """``arrays`` only: name of the array of an ``.npz`` file that holds the videos. None uses the only array with three
    or more axes, not counting ``actions``."""
    array_fps: Annotated[float, Field(gt=0, le=1000)] = 10.0
    """``arrays``, ``hdf5`` and ``bair``: frames per second, which these files do not state."""
    camera: Literal["image_main", "image_aux1", "both"] = "image_aux1"
    """``bair`` only: which camera to read. Published comparisons use ``image_aux1``; ``both`` makes two videos of each
    record."""
    split_number: Literal[1, 2, 3] = 1
    """``ucf101`` only: number of the official split."""
    split_files: str | None = None
    """Folder of the split lists, relative to ``url`` or absolute. ``ucf101``: holds ``trainlist01.txt`` and so on; None
    uses ``ucfTrainTestlist``. ``tgif``: holds ``train.txt``, ``val.txt`` and ``test.txt``; None splits by a hash."""
    captions: str = "tgif-v1.0.tsv"
    """``tgif`` only: the list of URLs and captions, relative to ``url`` or absolute."""

    @field_validator("actions", "cameras", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, names: Any) -> Any:
        return [names] if isinstance(names, str) else names

    @field_validator("axes")
    @classmethod
    def _are_axes(cls, axes: str | None) -> str | None:
        if axes is not None and not (set("THW") <= set(axes) <= set("NTHWC") and len(set(axes)) == len(axes)):
            raise ValueError(f"axes={axes} must hold T, H and W, and may hold N and C, each once (such as TNHW)")
        return axes

    @model_validator(mode="after")
    def _refuse_keys_of_other_types(self) -> Self:
        for name, types in _TYPES_OF_KEY.items():
            value: Any = getattr(self, name)
            if self.type not in types and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} belongs to type {' and '.join(types)}, not to {self.type}; remove it")
        columns = self.columns.model_dump(exclude=_JSON_COLUMNS)
        if self.type == "webdataset" and columns != TableColumns().model_dump(exclude=_JSON_COLUMNS):
            raise ValueError(
                f"columns: webdataset reads only {', '.join(sorted(_JSON_COLUMNS))}; remove the other columns"
            )
        return self


_JSON_COLUMNS = {"label", "text", "group"}

_TYPES_OF_KEY = {
    "label": ("folder",),
    "sidecars": ("folder",),
    "group": ("folder",),
    "actions_suffix": ("folder",),
    "columns": ("table", "webdataset"),
    "actions": ("lerobot", "arrays"),
    "cameras": ("lerobot",),
    "axes": ("arrays",),
    "array_key": ("arrays",),
    "array_fps": ("arrays", "hdf5", "bair"),
    "camera": ("bair",),
    "split_number": ("ucf101",),
    "split_files": ("ucf101", "tgif"),
    "captions": ("tgif",),
}
