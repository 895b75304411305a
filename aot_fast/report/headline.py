"""What improved and what it cost, in sentences that stay true when the effect is negative or within noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aot_fast.evaluation.summary import steps_and_seconds
from aot_fast.report.run_files import RunFiles

FEW = 30
"""Below so many questions an interval is printed but nothing is concluded from it."""


@dataclass(frozen=True)
class Headline:
    """One comparison."""

    title: str
    old: float | None
    new: float | None
    change: str
    """The difference with its interval."""
    mood: str
    """good | bad | unclear: which way it went for the one who trained, if that can be told."""
    text: str


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.1f}".replace("-", "−")


def clock(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def direction(difference: Mapping[str, Any]) -> str:
    """up | down | unclear | few, of a difference with its 95 % interval."""
    if difference["n"] < FEW:
        return "few"
    return "up" if difference["low"] > 0 else "down" if difference["high"] < 0 else "unclear"


def _change(difference: Mapping[str, Any]) -> str:
    low, high = points(difference["low"]), points(difference["high"])
    return f"{points(difference['value'])} points, 95 % interval {low} to {high}, n = {difference['n']}"


CONCLUSIONS = {
    "unclear": "The interval includes zero: this run shows no clear change.",
    "few": f"With fewer than {FEW} questions, nothing should be concluded from it.",
}


def _headline(title: str, old: float, new: float, difference: Mapping[str, Any], what: str, up: str, down: str) -> Headline:
    went = direction(difference)
    mood = {"up": "good", "down": "bad"}.get(went, "unclear")
    conclusion = {"up": up, "down": down, **CONCLUSIONS}[went]
    return Headline(title, old, new, _change(difference), mood, f"{what} {conclusion}")


def _names(run: RunFiles) -> tuple[str, str]:
    return tuple(f"defender_{run.tables.defenders[end]}" for end in (0, -1))


def _under_attack(run: RunFiles, on: str) -> Headline | None:
    difference = run.figures["difference_of_defenders"].get(on)
    if not difference or difference["value"] is None:
        return None
    first, last = _names(run)
    accuracy = run.figures["accuracy_under_attack"][on]
    return _headline(
        f"Accuracy on the edits of {on}",
        accuracy[first],
        accuracy[last],
        difference,
        f"Held-out questions answered rightly on its valid edits, by {first} and by {last}.",
        "The trained Defender withstands this Attacker better.",
        "The trained Defender withstands this Attacker worse.",
    )


def _clean(run: RunFiles) -> Headline | None:
    difference = run.figures["difference_of_defenders"].get("clean")
    if not difference or difference["value"] is None:
        return None
    first, last = _names(run)
    accuracy = run.figures["clean_accuracy"]
    return _headline(
        "Accuracy on clean images",
        accuracy[first],
        accuracy[last],
        difference,
        f"What hardening cost or gained where nobody attacks, {first} against {last}.",
        "Clean accuracy rose.",
        "Clean accuracy fell: that is the price.",
    )


def _attacker(run: RunFiles) -> Headline | None:
    difference = run.figures["difference_of_attackers"]
    if not difference or difference["value"] is None:
        return None
    first, last, defender = run.tables.attackers[0], run.tables.attackers[-1], _names(run)[0]
    success = run.figures["attack_success"]
    old, new = success[first][defender], success[last][defender]
    return _headline(
        f"Attack success against {defender}",
        old,
        new,
        difference,
        f"Right without the attack, wrong with it: {first} against {last}. The change is over the questions that both attack.",
        "The Attacker learned to fool the first Defender.",
        "The Attacker became worse at fooling the first Defender.",
    )


def headlines(run: RunFiles) -> list[Headline]:
    """The comparisons that the run allows so far: robustness, its price, and the Attacker's progress."""
    robust = [_under_attack(run, on) for on in dict.fromkeys((*run.tables.attackers[-1:], *run.tables.attackers[:1]))]
    return [headline for headline in (*robust, _clean(run), _attacker(run)) if headline]


def tally(found: list[Headline]) -> str:
    """Which way the comparisons went, in one sentence."""
    moods = [headline.mood for headline in found]
    good, bad, unclear = (moods.count(mood) for mood in ("good", "bad", "unclear"))
    if not good:
        return f"Nothing improved beyond chance in this run: {bad} of {len(found)} comparisons went down, {unclear} are unclear."
    return f"Of {len(found)} comparisons, {good} improved beyond chance, {bad} went down, {unclear} are unclear."


def cost(run: RunFiles) -> Iterator[str]:
    """Time and steps, and what the codec alone does."""
    seconds, counts = phase_seconds(run.seconds), steps_and_seconds(run.rows)[0]
    if seconds:
        listed = ", ".join(f"{count} {phase} steps" for phase, count in counts.items())
        yield f"Time: {clock(sum(total for total, _ in seconds.values()))}" + (f", for {listed}." if listed else ".")
    floor = run.figures["integrity"].get("roundtrip")
    if floor:
        yield f"The codec alone leaves the targets at q = {floor['median']:.3f} (median; 5th percentile {floor['p5']:.3f})."


def phase_seconds(seconds: Mapping[str, float]) -> dict[str, tuple[float, dict[str, float]]]:
    """Seconds of each phase with those of its parts, the longest first, from spans named `phase` and `phase/part`."""
    phases: dict[str, dict[str, float]] = {}
    for name, value in seconds.items():
        phase, _, part = name.partition("/")
        phases.setdefault(phase, {})[part] = value
    totals = {phase: (parts.pop("", None) or sum(parts.values()), parts) for phase, parts in phases.items()}
    return dict(sorted(totals.items(), key=lambda item: -item[1][0]))
