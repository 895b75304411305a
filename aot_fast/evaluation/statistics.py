"""Shares with Wilson intervals, and paired differences with bootstrap intervals; all intervals are of 95 %."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
    return clustered_difference({id: [(float(new[id]), float(old[id]))] for id in new.keys() & old.keys()}, seed)


Clusters = Mapping[str, Sequence[tuple[float, float]]]
"""(new, old) of every pair of a cluster, by the cluster's id: a question's pairs under several Attackers, or in several runs."""


def clustered_difference(clusters: Clusters, seed: int = 0) -> Difference:
    """Mean of new minus old over all pairs, with a percentile bootstrap interval over clusters: all pairs of one are drawn together.

    The pairs of a question are alike; drawn one by one they would pass for independent, and the interval would be too narrow.
    """
    rows = [(sum(new - old for new, old in clusters[id]), len(clusters[id])) for id in sorted(clusters) if clusters[id]]
    if not rows:
        return Difference(None, -1.0, 1.0, 0)
    # Resampling clusters is drawing how often each different (sum, pairs) occurs: one multinomial draw a resample.
    kinds, counts = np.unique(np.array(rows, dtype=np.float64), axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(rows), counts / len(rows), size=NUM_RESAMPLES)
    low, high = np.percentile((draws @ kinds[:, 0]) / (draws @ kinds[:, 1]), [2.5, 97.5])
    sums, pairs = zip(*rows)
    return Difference(float(sum(sums) / sum(pairs)), float(low), float(high), int(sum(pairs)))


def clustered_median_difference(clusters: Clusters, seed: int = 0) -> Difference:
    """Median of new minus median of old over all pairs, with a percentile bootstrap interval over clusters."""
    ids = [id for id in sorted(clusters) if clusters[id]]
    if not ids:
        return Difference(None, -1.0, 1.0, 0)
    owner = np.repeat(np.arange(len(ids)), [len(clusters[id]) for id in ids])
    values = np.array([pair for id in ids for pair in clusters[id]])
    value = float(np.subtract(*np.median(values, axis=0)))
    chance, found = np.random.default_rng(seed), []
    for _ in range(0, NUM_RESAMPLES, 500):  # 500 resamples at a time: 3,000 pairs are then 12 MB
        draws = chance.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=500)[:, owner]
        found.append(_weighted_median(values[:, 0], draws) - _weighted_median(values[:, 1], draws))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return Difference(value, float(low), float(high), len(values))


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[R] median of `values` [N] where each occurs `weights` [R, N] times."""
    order = np.argsort(values, kind="stable")
    running = np.cumsum(weights[:, order], axis=1)
    total, ranked = running[:, -1:], values[order]
    lower, upper = (ranked[(running <= rank).sum(axis=1)] for rank in ((total - 1) // 2, total // 2))
    return (lower + upper) / 2


@dataclass(frozen=True)
class MeanOverSeeds:
    """Mean of one figure a seed, with Student's t interval; no interval of fewer than two seeds."""

    mean: float | None
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        return asdict(self)


T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
)
"""97.5 % quantile of Student's t with 1, 2, ... degrees of freedom; beyond the table its last value, which is a little too wide."""


def mean_over_seeds(values: Sequence[float]) -> MeanOverSeeds:
    """Mean and 95 % t interval of independent values, one a seed."""
    n = len(values)
    mean = float(np.mean(values)) if n else None
    if n < 2:
        return MeanOverSeeds(mean, None, None, n)
    half = T_975[min(n - 1, len(T_975)) - 1] * float(np.std(values, ddof=1)) / math.sqrt(n)
    return MeanOverSeeds(mean, mean - half, mean + half, n)
