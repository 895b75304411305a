"""Figures of one arm over its seeds: the mean, and how far apart the seeds are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aot_fast.report.attacks import TypeRow, attack_types, in_order, number


@dataclass(frozen=True)
class Spread:
    """Values of one figure, one a seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def cell(self) -> dict[str, Any]:
        """As the heat map wants it."""
        return {"value": self.mean, "low": self.low, "high": self.high, "n": len(self.values)}


def spread(values: Iterable[Any]) -> Spread | None:
    """Of the values that are there; None of nothing."""
    found = tuple(value for value in map(number, values) if value is not None)
    return Spread(found) if found else None


def lookup(tree: Any, *path: str) -> Any:
    """The figure at a path of keys; None where the path ends early."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def over_seeds(by_seed: Mapping[str, Any], *path: str) -> Spread | None:
    """A figure of one arm over its seeds."""
    return spread(lookup(figures, *path) for figures in by_seed.values())


def numbered(names: Iterable[str]) -> list[str]:
    """Names such as attacker_0, attacker_10 by their number; other names last."""
    numbers = {name: name.rpartition("_")[2] for name in names}
    return sorted(numbers, key=lambda name: (not numbers[name].isdecimal(), int(numbers[name]) if numbers[name].isdecimal() else 0, name))


def keys_of(by_seed: Mapping[Any, Any], *path: str) -> list[str]:
    """Keys that any seed has at a path, in the order of their numbers."""
    return numbered({key for figures in by_seed.values() for key in (lookup(figures, *path) or {})})


def mean_types(by_seed: Mapping[str, Any]) -> dict[str, list[TypeRow]]:
    """Types of attack by Attacker, averaged over the seeds that tell them; a type that a seed never shows counts as 0 there."""
    seeds = [found for figures in by_seed.values() if (found := attack_types(figures))]
    means: dict[str, list[TypeRow]] = {}
    for on in numbered({on for found in seeds for on in found}):
        rows = [{row.name: row for row in found[on]} for found in seeds if on in found]
        names = in_order(name for found in rows for name in found)
        means[on] = [_mean_row(name, [found[name] for found in rows if name in found], len(rows)) for name in names]
    return means


def _mean_row(name: str, rows: list[TypeRow], num_seeds: int) -> TypeRow:
    defenders = numbered({defender for row in rows for defender in row.success})
    success = {defender: spread(row.success.get(defender) for row in rows) for defender in defenders}
    share = sum(row.share for row in rows) / num_seeds
    return TypeRow(name, share, {defender: found.mean if found else None for defender, found in success.items()})
