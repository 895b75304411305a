"""Shapes and colours read back from the pixels of a small-world picture, by templates that `render` draws.

A pixel is taken for a mixture p = b + a (c - b) of the smooth background b and one of the eight colours c: antialiased and blurred edges
lie on such lines, so a pale red edge is not mistaken for pink. Shapes: H, W picture, K canvas of a template, M templates, S shifts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import ImageFilter

from aot_fast.data.scenes import COLORS, SHAPES, Background, Scene, SceneObject, render

PX = 64
"""Side at which pictures are read, whatever their own: every threshold here and in `audit` was measured at it."""
CANVAS = 28
"""Room for the largest template and its shifts."""
SIZES_PX = 6.0 * 1.06 ** np.arange(24)
"""6 to 22.9 px: from under the least implant (7 px) to over the largest object (19.2 px); a size is at most 3 % off its template's."""
PHASES = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5))
SHIFTS = tuple((dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1))
BLUR_PX = 0.4
"""The codec's own blur: with it the likeness of 286 objects that went through the codec was 0.962 to 0.989 (least, median)."""
LINE_TOLERANCE = 25.0
"""A pixel counts for a colour when its distance to that colour's line (RGB, 0 to 255) exceeds the nearest line's by no more."""
PALE = 135.0
"""Least channel from which a pixel is background: an object's colours have one of at most 120, backgrounds none under about 150."""
OUTLIER = 45.0
MIN_PALE = 16
USUAL_BACKGROUND = 212.0
"""Where hardly any background is left to be seen."""
WHITE = Background((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), 0.0, (0.0, 0.0, 0.0, 0.0))


@lru_cache(maxsize=256)
def coverage(item: SceneObject, size_px: int, blur_px: float = 0.0) -> np.ndarray:
    """How much of each pixel an object covers, float32 [size, size] in [0, 1], as `render` draws it."""
    black = SceneObject(item.shape, "black", item.size, item.x, item.y)
    picture = render(Scene(WHITE, (), (black,)), size_px)
    if blur_px:
        picture = picture.filter(ImageFilter.GaussianBlur(blur_px))
    return (255 - np.asarray(picture, np.float32)[..., 0]) / (255 - COLORS["black"][0])


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """[M, K * K] with M = sizes x phases x shapes, and their squares."""
    places = [(size / CANVAS, 0.5 + dx / CANVAS, 0.5 + dy / CANVAS) for size in SIZES_PX for dx, dy in PHASES]
    drawn = [coverage(SceneObject(shape, "", *place), CANVAS, BLUR_PX).ravel() for place in places for shape in SHAPES]
    bank = np.stack(drawn)
    return bank, bank**2


@dataclass(frozen=True)
class Fit:
    """The template of one shape that is most like a patch of coverage."""

    likeness: float
    """Soft IoU a.t / (a.a + t.t - a.t) in [0, 1]; the IoU where both are 0 or 1."""
    shape: str
    size: float
    """Fraction of the picture's side, as are x and y."""
    x: float
    y: float

    def item(self, color: str) -> SceneObject:
        return SceneObject(self.shape, color, self.size, self.x, self.y)


def _windows(plane: np.ndarray, row: int, column: int) -> np.ndarray:
    """[H, W] -> [S, K * K]: the windows around a pixel corner, shifted; zero outside the picture."""
    margin = CANVAS // 2 + 1
    padded = np.pad(plane, margin)
    top, left = row + margin - CANVAS // 2, column + margin - CANVAS // 2
    parts = [padded[top + dy : top + dy + CANVAS, left + dx : left + dx + CANVAS].ravel() for dx, dy in SHIFTS]
    return np.stack(parts)


def fit_shapes(cover: np.ndarray, weight: np.ndarray, centre_px: tuple[float, float], sizes_px: tuple[float, float]) -> list[Fit]:
    """The best place and size of each shape, most alike first.

    cover, weight: float32 [H, W] in [0, 1]; a pixel of weight 0 speaks for nothing, nor does the world outside the picture.
    centre_px: (x, y), searched within 1.5 px. sizes_px: least and greatest side.
    """
    column, row = (round(min(max(c, 0.0), float(PX))) for c in centre_px)
    first, last = np.searchsorted(SIZES_PX, sizes_px)
    first, last = min(first, len(SIZES_PX) - 1), max(min(last, len(SIZES_PX)), min(first, len(SIZES_PX) - 1) + 1)
    step = len(PHASES) * len(SHAPES)
    bank, squares = (part[first * step : last * step] for part in _templates())
    w = _windows(weight, row, column)
    a = _windows(cover, row, column)
    common = (w * a) @ bank.T
    likeness = common / ((w * a * a).sum(1, keepdims=True) + w @ squares.T - common + 1e-6)
    likeness = likeness.reshape(len(SHIFTS), -1, len(PHASES), len(SHAPES))
    fits = []
    for k, shape in enumerate(SHAPES):
        shift, size, phase = np.unravel_index(likeness[..., k].argmax(), likeness.shape[:3])
        (dx, dy), (px, py) = SHIFTS[shift], PHASES[phase]
        place = (round(float(SIZES_PX[first + size]) / PX, 4), round((column + dx + px) / PX, 4), round((row + dy + py) / PX, 4))
        fits.append(Fit(float(likeness[shift, size, phase, k]), shape, *place))
    return sorted(fits, key=lambda fit: -fit.likeness)


@lru_cache(maxsize=1)
def _surface() -> np.ndarray:
    """Polynomials of second degree over the picture, [H * W, 6]."""
    axis = np.linspace(-1, 1, PX, dtype=np.float32)
    x, y = (part.ravel() for part in np.meshgrid(axis, axis))
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)


def smooth_background(pixels: np.ndarray) -> np.ndarray:
    """The background under the objects, [H, W, 3]: a quadratic surface through every other pale pixel, without outliers."""
    basis = _surface()
    some, flat = basis.reshape(PX, PX, -1)[::2, ::2].reshape(-1, basis.shape[1]), pixels[::2, ::2].reshape(-1, 3)
    pale = flat.min(1) > PALE
    for _ in range(2):
        if pale.sum() < MIN_PALE:
            return np.full_like(pixels, USUAL_BACKGROUND)
        weighted = some.T * pale
        surface = np.linalg.solve(weighted @ some + 1e-3 * np.eye(len(weighted), dtype=np.float32), weighted @ flat)
        pale &= np.abs(flat - some @ surface).max(1) < OUTLIER
    return (basis @ surface).reshape(pixels.shape)


@dataclass(frozen=True)
class Layers:
    """A picture taken apart into its background and what lies over it."""

    ground: np.ndarray
    """[H, W, 3], 0 to 255."""
    color: np.ndarray
    """[H, W]: number of the colour whose line is nearest; means nothing where `cover` is small."""
    cover: np.ndarray
    """[H, W]: coverage by that colour, in [0, 1]."""
    covers: np.ndarray
    """[colours, H, W]: coverage by each colour, 0 where the pixel is not of it."""


def take_apart(pixels: np.ndarray) -> Layers:
    """Layers of a picture, float32 [H, W, 3] in [0, 255]."""
    ground = smooth_background(pixels)
    palette = np.array(list(COLORS.values()), np.float32)
    b, over = (part.reshape(-1, 3) for part in (ground, pixels - ground))
    # |c - b|^2 and (p - b).(c - b) by matrix products: ten times as fast as the differences themselves.
    line = (palette**2).sum(1) - 2 * b @ palette.T + (b * b).sum(1, keepdims=True)  # [H * W, colours]
    dot = over @ palette.T - (over * b).sum(1, keepdims=True)
    along = (dot / line).clip(0, 1)
    squared = (over * over).sum(1, keepdims=True) + along * (along * line - 2 * dot)
    distance = np.sqrt(squared.clip(0))
    color, rows = distance.argmin(1), np.arange(len(b))
    covers = np.where(distance <= distance[rows, color][:, None] + LINE_TOLERANCE, along, 0)
    shape = pixels.shape[:2]
    return Layers(ground, color.reshape(shape), along[rows, color].reshape(shape), covers.T.reshape(-1, *shape))
