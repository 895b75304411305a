"""Shares with Wilson intervals, and paired differences with bootstrap intervals; all intervals are of 95 %."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

Z_95 = 1.959963984540054
NUM_RESAMPLES = 10_000


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927); (0, 1), i.e. nothing known, for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the exact bound is 0 or 1, which rounding misses.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


@dataclass(frozen=True)
class Share:
    """So many of `n`."""

    successes: int
    n: int

    @property
    def value(self) -> float | None:
        """The share in [0, 1]; None of nothing."""
        return self.successes / self.n if self.n else None

    def to_json(self) -> dict[str, float | int | None]:
        low, high = wilson(self.successes, self.n)
        return {"value": self.value, "n": self.n, "low": low, "high": high}


def share(outcomes: Iterable[bool]) -> Share:
    """How many of the outcomes are true."""
    outcomes = list(outcomes)
    return Share(sum(outcomes), len(outcomes))


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences (new minus old) with its interval; `value` is None of nothing."""

    value: float | None
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        return asdict(self)


def paired_difference(new: Mapping[str, bool], old: Mapping[str, bool], seed: int = 0) -> Difference:
    """Difference of two shares over the questions that both answer, with a percentile bootstrap interval over those questions."""
    differences = [float(new[id]) - float(old[id]) for id in sorted(new.keys() & old.keys())]
    if not differences:
        return Difference(None, -1.0, 1.0, 0)
    n = len(differences)
    values, counts = np.unique(differences, return_counts=True)
    # Resampling questions is drawing how often each of the three possible differences occurs: one multinomial draw a resample.
    means = np.random.default_rng(seed).multinomial(n, counts / n, size=NUM_RESAMPLES) @ values / n
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(float(np.mean(differences)), float(low), float(high), n)
