"""The comparisons of a study as verdicts: what was claimed, whether it was reached, and the picture of its evidence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aot_fast.report.headline import FEW, direction, percent, points
from aot_fast.report.plots import Plot, Row, scale_of

MOODS = {True: ("good", "reached"), False: ("bad", "not reached"), None: ("unclear", "unclear")}
EFFECTS = {
    "up": "The new figure is higher, beyond chance over questions.",
    "down": "The new figure is lower, beyond chance over questions.",
    "unclear": "The interval over questions includes zero: no clear change.",
    "few": f"With fewer than {FEW} questions, nothing should be concluded from it.",
    "none": "Nothing can be compared yet.",
}


@dataclass(frozen=True)
class Verdict:
    """One claim and what became of it."""

    title: str
    mood: str
    """good | bad | unclear."""
    label: str
    """reached | not reached | unclear | no goal set."""
    old: str
    new: str
    old_words: str
    new_words: str
    difference: str
    """Pooled over seeds; empty if nothing is measured."""
    interval: str
    n: int
    """Pairs that were compared."""
    sentences: tuple[str, ...]
    plot: Plot | None
    """The difference of every seed, and of all together; None if there is nothing to draw."""


def _level(what: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if what == "q" else percent(value)


def _signed(what: str, value: float) -> str:
    return f"{value:+.3f}".replace("-", "−") if what == "q" else points(value)


def _tick(what: str, value: float) -> str:
    """A difference without needless digits."""
    shown = round(value if what == "q" else 100 * value, 3)
    return f"{shown:+g}".replace("-", "−") if shown else "0"


def _unit(what: str) -> str:
    return "" if what == "q" else " points"


def _interval(what: str, found: Mapping[str, Any]) -> str:
    return f"{_signed(what, found['low'])} to {_signed(what, found['high'])}"


def _goal_words(what: str, goal: float, reached: bool | None, found: Mapping[str, Any]) -> str:
    """The goal, and how sure it is that it was reached or missed."""
    words = f"The goal was at least {_tick(what, goal)}{_unit(what)}"
    if not _known(found, "value"):
        return words + "."
    if reached is False and found["value"] >= goal:
        return words + ", with an interval clear of zero."
    if reached is False and found["high"] >= goal:
        return words + "; the interval still includes the goal, so that more questions could show it."
    if reached and found["low"] < goal:
        return words + "; the interval reaches below it, so that this may be chance."
    return words + "."


def _known(found: Any, key: str) -> bool:
    return isinstance(found, Mapping) and found.get(key) is not None


def _over_seeds_words(what: str, over: Mapping[str, Any] | None, differences: list[float]) -> str:
    if len(differences) < 2:
        return "One seed only: nothing is known about other seeds." if differences else ""
    rises, falls, total = sum(value > 0 for value in differences), sum(value < 0 for value in differences), len(differences)
    words = f"It rises in {rises or 'none'} and falls in {falls or 'none'} of {total} seeds"
    if total in (rises, falls):
        words = f"It {'rises' if rises else 'falls'} in all {total} seeds"
    if not _known(over, "mean") or not _known(over, "low"):
        return words + "."
    zero = "; that interval includes zero, so other seeds may differ" if over["low"] <= 0 <= over["high"] else ""
    return f"{words}; mean over seeds {_signed(what, over['mean'])}{_unit(what)}, 95 % interval {_interval(what, over)}{zero}."


def _row(what: str, label: str, kind: str, scale: Any, found: Mapping[str, Any], value: float) -> Row:
    has = found.get("low") is not None and found.get("high") is not None
    low, high = (scale.at(found["low"]), scale.at(found["high"])) if has else (None, None)
    note = f"95 % interval {_interval(what, found)}" if has else "no interval"
    return Row(label, _signed(what, value), kind, scale.at(value), low, high, note=note)


def _evidence(comparison: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any], float]]:
    """(label, kind, interval, value) of every line of the plot."""
    for one in comparison.get("per_seed") or []:
        if _known(one.get("difference"), "value"):
            yield f"seed {one.get('seed')}", "seed", one["difference"], one["difference"]["value"]
    pooled = comparison.get("pooled") or {}
    if _known(pooled.get("difference"), "value"):
        yield "all questions", "pooled", pooled["difference"], pooled["difference"]["value"]
    over = pooled.get("over_seeds")
    if _known(over, "mean") and _known(over, "low"):
        yield "over seeds", "seeds", over, over["mean"]


def _plot(comparison: Mapping[str, Any]) -> Plot | None:
    what, goal, lines = comparison.get("what", ""), comparison.get("goal"), list(_evidence(comparison))
    if not lines:
        return None
    # Seeds and all questions set the axis; an interval over two or three seeds can be so wide that nothing else could be seen.
    ends = [found.get(end) for _, kind, found, _ in lines if kind != "seeds" for end in ("low", "high")]
    scale = scale_of([value for value in (*ends, *(line[3] for line in lines), goal) if value is not None])
    rows = [_row(what, label, kind, scale, found, value) for label, kind, found, value in lines]
    ticks = [(scale.at(value), _tick(what, value)) for value in scale.ticks()]
    if goal is None:
        return Plot(rows, ticks, scale.at(0.0))
    return Plot(rows, ticks, scale.at(0.0), scale.at(goal), f"goal {_tick(what, goal)}")


def verdict(comparison: Mapping[str, Any]) -> Verdict:
    """A comparison of `summary.json` in words; what it lacks is said, not raised."""
    what, goal, reached = comparison.get("what", ""), comparison.get("goal"), comparison.get("reached")
    pooled = comparison.get("pooled") or {}
    difference = pooled.get("difference") or {}
    known = _known(difference, "value")
    mood, label = MOODS[reached] if goal is not None and known else ("unclear", "no goal set" if goal is None else "not measured")
    went = direction(difference) if known else "none"
    goal_words = _goal_words(what, goal, reached, difference) if goal is not None else ""
    values = [found["value"] for _, kind, found, _ in _evidence(comparison) if kind == "seed"]
    sentences = (goal_words, EFFECTS[went], _over_seeds_words(what, pooled.get("over_seeds"), values))
    return Verdict(
        title=str(comparison.get("title") or comparison.get("key") or "A comparison"),
        mood=mood,
        label=label,
        old=_level(what, pooled.get("old")),
        new=_level(what, pooled.get("new")),
        old_words=str(comparison.get("old") or "old"),
        new_words=str(comparison.get("new") or "new"),
        difference=f"{_signed(what, difference['value'])}{_unit(what)}" if known else "",
        interval=_interval(what, difference) if known else "",
        n=difference["n"] if known else 0,
        sentences=tuple(sentence for sentence in sentences if sentence),
        plot=_plot(comparison),
    )


def tally(verdicts: list[Verdict]) -> str:
    """How many goals were reached, in one sentence."""
    labels = [verdict.label for verdict in verdicts if verdict.label != "no goal set"]
    if not labels:
        return "No goal was set."
    counted = ", ".join(f"{labels.count(label)} {label}" for label in dict.fromkeys(labels) if label != "reached")
    return f"{labels.count('reached')} of {len(labels)} goals reached" + (f"; {counted}." if counted else ".")
