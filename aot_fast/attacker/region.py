"""Edits of a window of the full-resolution picture (MATH.md section 4): the cost does not grow with the picture, and outside the window
every bit stays.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image as images
from PIL.Image import Image, Resampling

from aot_fast.data.schema import Box

TRIES = 64
"""Places drawn before the one that covers least of the targets is taken."""


class Window(NamedTuple):
    """In pixels of the picture."""

    left: int
    top: int
    width: int
    height: int


def place_window(size: tuple[int, int], boxes: Sequence[Box], pixels: int, unit: int, seed: int) -> Window | None:
    """A window of about `pixels` area in a picture of `size` (width, height), at a place drawn by `seed` that covers no box [x, y, w, h].

    Its sides are multiples of `unit`; as wide and high as the picture allows where that is narrow. Where every place drawn covers a part
    of a box, the one that covers least. None for a picture of no more than `pixels`, or lower than a unit: it is edited as a
    whole.
    """
    width, height = size
    if width * height <= pixels or min(size) < unit:
        return None
    side = math.sqrt(pixels)
    wide = _multiple(min(side if height >= side else pixels / height, width), width, unit)
    tall = _multiple(min(pixels / wide, height), height, unit)
    draw = random.Random(seed)
    best: tuple[float, Window] | None = None
    for _ in range(TRIES):
        window = Window(draw.randint(0, width - wide), draw.randint(0, height - tall), wide, tall)
        covered = sum(_overlap(window, box) for box in boxes)
        if best is None or covered < best[0]:
            best = covered, window
        if not covered:
            break
    return best[1]


def cut(picture: Image, window: Window) -> Image:
    """The window's part of the picture."""
    return picture.crop((window.left, window.top, window.left + window.width, window.top + window.height))


def paste(picture: Image, window: Window, edit: Image, feather: int) -> Image:
    """A copy of the picture with the edit in the window. Over `feather` pixels from its border, but where that is the picture's own, the
    edit fades into what was there."""
    if edit.size != (window.width, window.height):
        edit = edit.resize((window.width, window.height), Resampling.LANCZOS)
    across = _fade(window.left, window.width, picture.width, feather)
    down = _fade(window.top, window.height, picture.height, feather)
    weight = np.minimum(down[:, None], across)[..., None]
    before, after = (np.asarray(x.convert("RGB"), dtype=np.float32) for x in (cut(picture, window), edit))
    mixed = np.rint(before + weight * (after - before)).astype(np.uint8)
    made = picture.convert("RGB") if picture.mode != "RGB" else picture.copy()
    made.paste(images.fromarray(mixed), (window.left, window.top))
    return made


def _multiple(length: float, most: int, unit: int) -> int:
    """The multiple of `unit` next to `length` that is at most `most`, and at least one unit."""
    return max(unit, min(round(length / unit), most // unit) * unit)


def _overlap(window: Window, box: Box) -> float:
    across = min(window.left + window.width, box[0] + box[2]) - max(window.left, box[0])
    down = min(window.top + window.height, box[1] + box[3]) - max(window.top, box[1])
    return max(0.0, across) * max(0.0, down)


def _fade(first: int, length: int, whole: int, feather: int) -> np.ndarray:
    """Weights [length] of the edit along one side: 1 inside, falling towards a border inside the picture."""
    place = np.arange(length, dtype=np.float32) + 1
    before = place / (feather + 1) if first > 0 else np.ones_like(place)
    after = place[::-1] / (feather + 1) if first + length < whole else np.ones_like(place)
    return np.clip(np.minimum(before, after), 0, 1)
