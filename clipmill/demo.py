"""The generated data set of ``clipmill demo``: solid objects that move by simple physics.

A class is a kind of object and motion. Lengths are in pixels, times in frames, speeds in pixels per frame. A video is
``CLASS/NAME.mp4`` with ``CLASS/NAME.actions.npy`` beside it: float32 [NUM_FRAMES, 2], the force (x, y) that acts on the
first object during each frame, in addition to gravity and contacts. Video i is a function of (seed, i).

Shapes: T = NUM_FRAMES, H and W of the canvas; a signed distance field is float64 [T, H, W], negative inside.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from clipmill import storage
from clipmill.errors import UserError
from clipmill.progress import bar
from clipmill.video.encode import encode_mp4

__all__ = ["CLASSES", "FPS", "NUM_FRAMES", "SIDE", "draw_video", "generate", "video_size"]

SIDE = 64
"""Shorter side of the videos in pixels; the objects fit into a square of it."""
NUM_FRAMES = 40
FPS = 12.5
_SCHEMA = 2
_MARKER = "demo.json"
_CRF = 10

_GRAVITY = 0.25
_BACKGROUND = np.array((18, 24, 48), np.float64)
_RED, _YELLOW, _BLUE, _GREEN, _ORANGE, _WHITE = (
    np.array(colour, np.float64)
    for colour in ((235, 70, 70), (250, 210, 60), (80, 150, 250), (90, 220, 110), (250, 140, 50), (240, 240, 240))
)


class _Scene(NamedTuple):
    """What one video shows: layers (signed distance field, colour) back to front, and forces float64 [T, 2]."""

    layers: list[tuple[np.ndarray, np.ndarray]]
    forces: np.ndarray


class _Canvas(NamedTuple):
    """The space that objects move in, walls at its edges, and their shapes on its pixels."""

    width: int
    height: int

    def disc(self, centres: np.ndarray, radius: float) -> np.ndarray:
        """Signed distance to a disc around each of [T, 2] centres."""
        x, y = self._offsets(centres)
        return np.hypot(x, y) - radius

    def box(self, centres: np.ndarray, half_side: float) -> np.ndarray:
        """Signed distance to an upright square around each of [T, 2] centres."""
        x, y = self._offsets(centres)
        x, y = np.abs(x) - half_side, np.abs(y) - half_side
        return np.hypot(np.maximum(x, 0), np.maximum(y, 0)) + np.minimum(np.maximum(x, y), 0)

    def triangle(self, centres: np.ndarray, headings: np.ndarray, size: float) -> np.ndarray:
        """Signed distance to a triangle with equal sides, ``size`` from centre to tip, that faces ``headings`` [T]."""
        x, y = self._offsets(centres)
        normals = headings[:, None, None] + np.pi
        turns = (0, 2 * np.pi / 3, -2 * np.pi / 3)
        return np.maximum.reduce([x * np.cos(normals + turn) + y * np.sin(normals + turn) for turn in turns]) - size / 2

    def segment(self, starts: np.ndarray, ends: np.ndarray, half_width: float) -> np.ndarray:
        """Signed distance to a rod with round ends between [T, 2] points."""
        x, y = self._offsets(starts)
        along = ends - starts
        dx, dy = along[:, 0, None, None], along[:, 1, None, None]
        share = np.clip((x * dx + y * dy) / (dx**2 + dy**2), 0, 1)
        return np.hypot(x - share * dx, y - share * dy) - half_width

    def path_between_walls(
        self, position: np.ndarray, velocity: np.ndarray, forces: np.ndarray, half_size: float, drag: float
    ) -> np.ndarray:
        """Path [T, 2] of a unit mass between walls that return 95 % of the speed."""
        low, high = half_size, np.array([self.width, self.height]) - half_size
        path = np.empty((NUM_FRAMES, 2))
        for frame, force in enumerate(forces):
            path[frame] = position
            velocity = drag * (velocity + force)
            position = position + velocity
            reflected = np.where(
                position < low, 2 * low - position, np.where(position > high, 2 * high - position, position)
            )
            velocity = np.where(reflected != position, -0.95 * velocity, velocity)
            position = reflected
        return path

    def _offsets(self, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Offsets (x, y) of every pixel's centre from [T, 2] points: two float64 arrays that broadcast to [T, H, W]."""
        x, y = np.arange(self.width) + 0.5, np.arange(self.height) + 0.5
        return x[None, None, :] - centres[:, 0, None, None], y[None, :, None] - centres[:, 1, None, None]


def _ball_bouncing(random: np.random.Generator, canvas: _Canvas) -> _Scene:
    """A ball falls, bounces off the floor and the walls; a steady wind pushes it."""
    radius = random.uniform(9, 13)
    position = np.array([random.uniform(radius, canvas.width - radius), random.uniform(radius, canvas.height / 2)])
    velocity = np.array([random.choice([-1, 1]) * random.uniform(0.8, 2.0), 0.0])
    forces = np.tile([random.uniform(-0.03, 0.03), 0.0], (NUM_FRAMES, 1))
    path = canvas.path_between_walls(position, velocity, forces + np.array([0, _GRAVITY]), radius, drag=1.0)
    return _Scene([(canvas.disc(path, radius), _RED)], forces)


def _balls_colliding(random: np.random.Generator, canvas: _Canvas) -> _Scene:
    """Two equal balls on one line bounce off each other and off the walls."""
    radius = random.uniform(8, 10)
    height = random.uniform(radius + 4, canvas.height - radius - 4)
    left = (canvas.width - SIDE) / 2  # on a wide canvas, too, they start close enough to meet
    x = left + np.array([random.uniform(radius, 18), random.uniform(46, SIDE - radius)])
    velocity = np.array([random.uniform(1.0, 2.2), -random.uniform(1.0, 2.2)])
    path = np.empty((NUM_FRAMES, 2))
    for frame in range(NUM_FRAMES):
        path[frame] = x
        x = x + velocity
        if x[1] - x[0] < 2 * radius and velocity[0] > velocity[1]:
            velocity = velocity[::-1].copy()  # equal masses exchange their speeds
        outside = (x < radius) & (velocity < 0) | (x > canvas.width - radius) & (velocity > 0)
        velocity = np.where(outside, -velocity, velocity)
    line = np.full(NUM_FRAMES, height)
    discs = [canvas.disc(np.stack([path[:, ball], line], axis=1), radius) for ball in (0, 1)]
    return _Scene([(discs[0], _YELLOW), (discs[1], _BLUE)], np.zeros((NUM_FRAMES, 2)))


def _square_pushed(random: np.random.Generator, canvas: _Canvas) -> _Scene:
    """A square on ice: each push lasts ten frames, friction slows it down."""
    half_side = random.uniform(8, 11)
    margin = half_side + 8
    position = np.array([random.uniform(margin, length - margin) for length in canvas])
    directions = random.integers(0, 4, size=NUM_FRAMES // 10) * np.pi / 2
    pushes = 0.3 * np.stack([np.cos(directions), np.sin(directions)], axis=1).round()
    forces = pushes.repeat(10, axis=0)
    path = canvas.path_between_walls(position, np.zeros(2), forces, half_side, drag=0.9)
    return _Scene([(canvas.box(path, half_side), _GREEN)], forces)


def _triangle_orbiting(random: np.random.Generator, canvas: _Canvas) -> _Scene:
    """A triangle flies around the centre, held on its circle by a central force."""
    size = random.uniform(14, 17)
    orbit = random.uniform(13, 16)
    turn = random.choice([-1, 1]) * random.uniform(0.09, 0.15)
    angle = random.uniform(0, 2 * np.pi) + turn * np.arange(NUM_FRAMES)
    outward = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    heading = angle + np.sign(turn) * np.pi / 2
    forces = -(turn**2) * orbit * outward
    centre = np.array([canvas.width, canvas.height]) / 2
    return _Scene([(canvas.triangle(centre + orbit * outward, heading, size), _ORANGE)], forces)


def _pendulum_swinging(random: np.random.Generator, canvas: _Canvas) -> _Scene:
    """A weight on a rod swings from a hinge at the top."""
    radius = random.uniform(8, 10)
    length = random.uniform(30, 40)
    hinge = np.array([canvas.width / 2, 6.0])
    angle = random.choice([-1, 1]) * random.uniform(0.5, 0.75)
    turn = 0.0
    angles = np.empty(NUM_FRAMES)
    for frame in range(NUM_FRAMES):
        angles[frame] = angle
        turn -= 2 * _GRAVITY / length * np.sin(angle)
        angle += turn
    weight = hinge + length * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    rod = canvas.segment(np.broadcast_to(hinge, weight.shape), weight, half_width=2.0)
    return _Scene([(rod, _WHITE), (canvas.disc(weight, radius), _BLUE)], np.zeros((NUM_FRAMES, 2)))


_CLASSES: dict[str, Callable[[np.random.Generator, _Canvas], _Scene]] = {
    "ball_bouncing": _ball_bouncing,
    "balls_colliding": _balls_colliding,
    "pendulum_swinging": _pendulum_swinging,
    "square_pushed": _square_pushed,
    "triangle_orbiting": _triangle_orbiting,
}
CLASSES = tuple(_CLASSES)
"""Names of the classes and of their folders. Video i has class i modulo their number."""


def video_size(clip_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of videos with the aspect ratio of the clips: the shorter side is `SIDE`, both are even."""
    shorter = min(clip_size)
    height, width = (2 * round(SIDE * length / shorter / 2) for length in clip_size)
    return height, width


def generate(url: str, *, num_videos: int = 240, seed: int = 0, size: tuple[int, int] = (SIDE, SIDE)) -> bool:
    """Writes the data set below ``url``, unless it is already complete.

    A marker document is written before the first video and marked complete after the last one, so the next call
    finishes an interrupted one, with the same bytes.

    Args:
        url: URL of the data set's folder.
        num_videos: number of videos over all classes.
        seed: seed of all random choices.
        size: (height, width) of the videos in pixels, see `video_size`.

    Returns:
        Whether anything was written.

    Raises:
        UserError: the URL is empty, or the folder holds other files or a generated data set of another number, size
            or seed. Nothing was written.
    """
    if not url:
        raise UserError("the demo needs a folder for its videos: set data.source.url to one that is empty or new")
    marker = storage.join(url, _MARKER)
    wanted = {"num_videos": num_videos, "seed": seed, "size": list(size)}
    try:
        found = storage.read_document(marker, _SCHEMA)
    except FileNotFoundError:
        if others := [*storage.list_folders(url), *(entry.name for entry in storage.list_folder(url))]:
            raise UserError(
                f"{url} holds other files ({others[0]}), and the demo must not mix its videos with them; set "
                "data.source.url to a folder that is empty or new"
            ) from None
        found = {**wanted, "complete": False}
        storage.publish_document(marker, found, _SCHEMA)
    if {key: found.get(key) for key in wanted} != wanted:
        recorded = ", ".join(f"{key} {found.get(key)}" for key in wanted)
        raise UserError(f"{url} holds a generated data set with {recorded}; remove it or choose another folder")
    if found["complete"]:
        return False
    with bar("demo", total=num_videos, unit="videos") as progress:
        for index in range(num_videos):
            label, frames, actions = draw_video(seed, index, size)
            name = storage.join(url, label, f"{label}_{index:04d}")
            array = io.BytesIO()
            np.save(array, actions)
            # The video comes last, so that a reader who sees it also finds its actions.
            storage.publish_bytes(f"{name}.actions.npy", array.getvalue())
            storage.publish_bytes(f"{name}.mp4", encode_mp4(frames, FPS, _CRF))
            progress.update(index + 1)
    storage.publish_document(marker, {**wanted, "complete": True}, _SCHEMA)
    return True


def draw_video(seed: int, index: int, size: tuple[int, int] = (SIDE, SIDE)) -> tuple[str, np.ndarray, np.ndarray]:
    """Video ``index`` of a data set.

    Args:
        seed: seed of the data set.
        index: index of the video; its class is this number modulo the number of classes.
        size: (H, W) in pixels, both at least `SIDE`.

    Returns:
        (class, frames uint8 [T, H, W, 3], actions float32 [T, 2]).
    """
    height, width = size
    label = CLASSES[index % len(CLASSES)]
    random = np.random.default_rng([seed, index])
    scene = _CLASSES[label](random, _Canvas(width, height))
    frames = np.broadcast_to(_BACKGROUND, (NUM_FRAMES, height, width, 3))
    for distance, colour in scene.layers:
        # Anti-aliasing: the share of a pixel that a straight edge covers, from its distance to the pixel's centre.
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        frames = frames + coverage * (colour - frames)
    return label, frames.round().astype(np.uint8), scene.forces.astype(np.float32)
