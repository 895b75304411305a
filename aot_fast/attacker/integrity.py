"""Semantic integrity: local SSIM of the objects that decide the answer (MATH.md section 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL.Image import Image, Resampling

from aot_fast.data.schema import Box

WINDOW = 11
"""Side in pixels of the Gaussian window (sigma 1.5): the smallest crop that SSIM is defined on."""


def integrity(original: Image, edit: Image, boxes: Sequence[Box], pad: float) -> tuple[float, ...]:
    """SSIM in [-1, 1] of each target box, padded by `pad` of its longer side; of the whole picture when there are no boxes.

    Boxes are [x, y, w, h] in pixels of `original`, which is resized to the edit's size when they differ (the boxes with it). Raises
    ValueError when the edit is smaller than the window, or a box lies outside the picture.
    """
    width, height = edit.size
    if min(width, height) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW} pixels a side; the edit has {width} x {height}")
    scale = width / original.width, height / original.height
    if original.size != edit.size:
        original = original.resize(edit.size, Resampling.LANCZOS)
    crops = [crop_of(box, scale, (width, height), pad) for box in boxes] or [(0, 0, width, height)]
    return tuple(ssim(*(_pixels(image, crop) for image in (original, edit))) for crop in crops)


def _pixels(image: Image, crop: tuple[int, int, int, int]) -> np.ndarray:
    """[H, W, 3] in [0, 1] of a part alone: a picture may have 40 megapixels."""
    return np.asarray(image.crop(crop).convert("RGB"), dtype=np.float64) / 255


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Mean SSIM over the channels of two [H, W, 3] arrays in [0, 1]: Gaussian window 11 x 11, sigma 1.5, data range 1."""
    from skimage.metrics import structural_similarity

    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "win_size": WINDOW}
    return float(structural_similarity(first, second, data_range=1.0, channel_axis=2, **settings))


def crop_of(box: Box, scale: tuple[float, float], size: tuple[int, int], pad: float) -> tuple[int, int, int, int]:
    """left, top, right, bottom in whole pixels of the edit: padded, cut at the border, and at least as large as the window."""
    x, y, w, h = box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1]
    if x >= size[0] or y >= size[1] or x + w <= 0 or y + h <= 0:
        raise ValueError(f"the target box {list(box)} lies outside the picture")
    margin = pad * max(w, h)
    left, right = span(x - margin, x + w + margin, size[0])
    top, bottom = span(y - margin, y + h + margin, size[1])
    return left, top, right, bottom


def span(low: float, high: float, size: int) -> tuple[int, int]:
    """[low, high) in whole pixels inside [0, size), enlarged evenly to the window and shifted inside where it is smaller."""
    first, last = max(0, math.floor(low)), min(size, math.ceil(high))
    missing = WINDOW - (last - first)
    if missing > 0:
        first = min(max(0, first - missing // 2), size - WINDOW)
        last = first + WINDOW
    return first, last


def ramp(q: float, q_low: float, q_high: float) -> float:
    """w(q) in [0, 1]: 0 up to q_low, 1 from q_high."""
    return min(1.0, max(0.0, (q - q_low) / (q_high - q_low)))
