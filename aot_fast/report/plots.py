"""Dots, bars and intervals on one scale, as positions in percent of the width: the page draws them as SVG without a fixed size."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MARGIN = 0.05
"""Part of the width left free at each end of a scale, so that nothing sits on the edge."""


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Position in percent, held to the axis."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)

    def ticks(self) -> list[float]:
        """Three to six round values."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / 3))
        step *= next(factor for factor in (5, 2, 1) if (self.high - self.low) / (factor * step) >= 3)
        return [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class Row:
    """One line of a plot; positions in percent."""

    label: str
    text: str
    """The value in figures."""
    kind: str
    """Style: seed | pooled | seeds | an arm."""
    at: float
    low: float | None = None
    high: float | None = None
    dots: tuple[float, ...] = ()
    note: str = ""
    """Said on hovering."""


@dataclass(frozen=True)
class Plot:
    """Rows on one axis."""

    rows: list[Row]
    ticks: list[tuple[float, str]]
    zero: float | None = None
    goal: float | None = None
    goal_text: str = ""


def scale_of(values: Iterable[float]) -> Scale:
    """An axis that holds all values and zero, with a margin."""
    values = [*values, 0.0]
    low, high = min(values), max(values)
    margin = MARGIN * (high - low or 1.0)
    return Scale(low - margin, high + margin)
