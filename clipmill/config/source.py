"""Section ``data.source``: where the raw videos are."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from clipmill.config.section import FREE, PLACE, Section

__all__ = ["SourceConfig", "TableColumns"]


class TableColumns(Section):
    """Names of the columns of a table of videos. None is not read; columns without a role become metadata."""

    url: str = "url"
    """Absolute path or URL of the file, or relative to the table's folder."""
    label: str | None = None
    """Class of the video; empty for none."""
    text: str | None = None
    """Text of the video, such as a caption; empty for none."""
    actions: str | None = None
    """Of a ``.npy`` file as ``actions_suffix`` describes it; empty for a video without actions."""
    split: str | None = None
    """``train`` or ``val`` (also ``valid``, ``validation``, ``test``; any case); empty: a hash decides."""
    start: str | None = None
    """Seconds from the first frame of the file at which the video begins; empty: at that frame."""
    end: str | None = None
    """Seconds from the first frame of the file at which the video ends; empty: with the file."""
    group: str | None = None
    """Origin of the video, such as the recording: videos of one group are in one split. Empty: the file is its own."""


class SourceConfig(Section):
    """Where the raw videos are: ``docs/sources.md`` shows each type. Keys of another type are refused."""

    type: Literal["folder", "table", "webdataset", "lerobot", "arrays", "hdf5", "bair", "ucf101", "tgif"] = "folder"
    """How the videos are stored."""
    url: Annotated[str, FREE, PLACE] = ""
    """Folder or bucket prefix, searched recursively; ``table``, ``hdf5``: the file; ``webdataset``, ``arrays``: either.
    Free: a moved corpus is the same corpus."""
    label: Literal["parent_folder", "none"] = "parent_folder"
    """``folder``: ``parent_folder``: the name of the folder that holds the file, none for files directly under
    ``url``, unless a sidecar has a ``label``. ``none``: no classes."""
    sidecars: tuple[Literal["txt", "json"], ...] = ("txt", "json")
    """``folder``: files beside ``x.mp4`` that describe it: ``x.txt`` is its text; ``x.json`` an object with its
    ``caption`` or ``text`` and its ``label``, all other keys are metadata. An empty list: none is read."""
    group: Literal["none", "parent_folder"] = "none"
    """``folder``: ``parent_folder``: the videos of one folder are of one origin, so all are in the same split."""
    actions_suffix: str | None = None
    """``folder``: ``.actions.npy``: where ``x.actions.npy`` lies beside ``x.mp4``, it holds the video's actions,
    float32 [num_frames, action_dim]; its clips carry theirs. A video without such a file has none."""
    columns: TableColumns = TableColumns()
    """``table``. ``webdataset``: ``label``, ``group`` and ``text`` (None: ``caption``, else ``text``) name keys of the
    ``json`` members."""
    actions: tuple[str, ...] | None = None
    """``lerobot``: columns whose values, side by side, are the actions of a frame, such as ``[action,
    observation.state]``. ``arrays``: arrays of the ``.npz`` files. None: ``action`` where there is one; an empty list:
    no actions."""
    cameras: tuple[str, ...] = ()
    """``lerobot``: keys of the cameras, such as ``[observation.images.top]``; empty: all but depth maps."""
    axes: str | None = None
    """``arrays``: a letter for each axis: N videos, T frames, H rows, W columns, C channels. ``TNHW`` is Moving MNIST's
    layout. None: ``THW``, ``THWC`` or ``NTHWC`` where the shape leaves no doubt."""
    array_key: str | None = None
    """``arrays``: the array of an ``.npz`` file that holds the videos; None: the only one of three or more axes beside
    ``actions``."""
    array_fps: Annotated[float, Field(gt=0, le=1000)] = 10.0
    """``arrays``, ``hdf5``, ``bair``: frames per second, which these files do not state."""
    camera: Literal["image_main", "image_aux1", "both"] = "image_aux1"
    """``bair``: ``image_aux1`` is the one of the published comparisons; ``both``: two videos a record."""
    split_number: Literal[1, 2, 3] = 1
    """``ucf101``: which of the official splits."""
    split_files: str | None = None
    """``ucf101``: folder of ``trainlist01.txt`` and so on, relative to ``url`` or absolute. None takes
    ``ucfTrainTestlist``. ``tgif``: folder of ``train.txt``, ``val.txt``, ``test.txt``. None splits by a hash."""
    captions: str = "tgif-v1.0.tsv"
    """``tgif``: the list of URLs and captions, relative to ``url`` or absolute."""

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
            raise ValueError(f"of columns, webdataset reads {', '.join(sorted(_JSON_COLUMNS))}; remove the others")
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
