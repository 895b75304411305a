"""Localized SSIM of MATH.md section 4, written so that it is a loss as well as a metric."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from aot_fast.data.schema import Box

WINDOW = 11
SIGMA = 1.5
PAD = 2
"""Pixels added on each side of a target box."""


def _window(dtype: torch.dtype) -> Tensor:
    x = torch.arange(WINDOW, dtype=dtype) - WINDOW // 2
    line = torch.exp(-(x**2) / (2 * SIGMA**2))
    line = line / line.sum()
    return line[:, None] * line[None, :]


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Mean SSIM [B] of images in [0, 1], 11x11 Gaussian window of sigma 1.5, per channel and averaged; no padding."""
    channels = a_BCHW.shape[1]
    weight = _window(a_BCHW.dtype).expand(channels, 1, WINDOW, WINDOW)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, weight, groups=channels)

    mean_a, mean_b = blur(a_BCHW), blur(b_BCHW)
    var_a, var_b = blur(a_BCHW**2) - mean_a**2, blur(b_BCHW**2) - mean_b**2
    covariance = blur(a_BCHW * b_BCHW) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean(dim=(1, 2, 3))


def _window_span(start: float, length: float, limit: int) -> tuple[int, int]:
    """Pixels [low, high) of a padded box side, enlarged to the window and kept inside the picture."""
    low, high = int(start) - PAD, int(start + length) + PAD
    missing = max(0, WINDOW - (high - low))
    low, high = max(0, low - (missing + 1) // 2), min(limit, high + missing // 2)
    return (max(0, high - WINDOW), high) if low + WINDOW > limit else (low, max(high, low + WINDOW))


def box_integrity(a_CHW: Tensor, b_CHW: Tensor, boxes: Sequence[Box]) -> list[float]:
    """SSIM of each target box [x, y, w, h] in pixels between two pictures in [0, 1]."""
    height, width = a_CHW.shape[-2:]
    scores = []
    for x, y, w, h in boxes:
        (left, right), (top, bottom) = _window_span(x, w, width), _window_span(y, h, height)
        crop = (slice(None), slice(top, bottom), slice(left, right))
        scores.append(ssim(a_CHW[crop][None], b_CHW[crop][None]).item())
    return scores
