"""Types of attack (added, replaced, removed, ...) as rows of a chart and a table, from figures that may lack them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TYPES = {
    "added": "something new is in the picture",
    "replaced": "an object became another one",
    "removed": "an object is gone",
    "subtle": "a change that is hard to see",
    "blob": "something coloured that is like no object",
    "hybrid": "several of these at once",
}
"""Types in the order shown, in plain words; any other name that occurs is shown after them."""


@dataclass(frozen=True)
class TypeRow:
    """One type of one Attacker's edits."""

    name: str
    share: float
    """Of the Attacker's edits, in [0, 1]."""
    success: Mapping[str, float | None]
    """By Defender: share of its attackable edits of this type that it answers wrongly."""


def number(value: Any) -> float | None:
    """A figure that may be plain, a share with its interval, or absent."""
    found = value.get("value") if isinstance(value, Mapping) else value
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def in_order(names: Iterable[str]) -> list[str]:
    """The known types first."""
    names = list(dict.fromkeys(names))
    return [*(name for name in TYPES if name in names), *(name for name in names if name not in TYPES)]


def type_rows(found: Mapping[str, Any]) -> list[TypeRow]:
    """Rows of one Attacker, from {type: {"share", "attack_success": {defender_j}}}; types that never occur are left out."""
    rows = []
    for name in in_order(found):
        entry = found[name] if isinstance(found[name], Mapping) else {"share": found[name]}
        share = number(entry.get("share", entry))
        if share:
            rows.append(TypeRow(name, share, {key: number(value) for key, value in (entry.get("attack_success") or {}).items()}))
    return rows


def attack_types(figures: Mapping[str, Any]) -> dict[str, list[TypeRow]]:
    """Rows by Attacker; empty for runs that do not tell types."""
    found = {on: type_rows(types) for on, types in (figures.get("attack_types") or {}).items()}
    return {on: rows for on, rows in found.items() if rows}
