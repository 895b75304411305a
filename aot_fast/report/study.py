"""From a study folder (several arms, several seeds) to one self-contained page: verdicts first, then what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aot_fast.evaluation.summary import versions
from aot_fast.report.attacks import TYPES
from aot_fast.report.averages import Spread, keys_of, mean_types, over_seeds, spread
from aot_fast.report.gallery import OUTCOMES
from aot_fast.report.headline import clock, percent, phase_seconds
from aot_fast.report.page import write_page
from aot_fast.report.plots import Plot, Row, Scale
from aot_fast.report.study_files import ARMS, GAME, StudyFiles, arm_title, read_study
from aot_fast.report.study_gallery import galleries
from aot_fast.report.verdicts import tally, verdict


def _ends(by_seed: Mapping[str, Any]) -> list[str]:
    """The first and the last Defender that an arm has figures of."""
    defenders = keys_of(by_seed, "clean_accuracy")
    return [defenders[0], defenders[-1]] if defenders else []


def _steps(run: Mapping[str, Any]) -> Any:
    """Optimizer steps of a run, given as one number or by phase."""
    steps = run.get("optimizer_steps")
    return sum(steps.values()) if isinstance(steps, Mapping) else steps


def _costs(study: StudyFiles) -> Iterator[dict[str, Any]]:
    """A row an arm: clean accuracy before and after, and what one run took."""
    for arm in study.arms:
        figures = study.figures(arm)
        ends, runs = _ends(figures), [study.run(arm, seed) for seed in study.seeds]
        yield {
            "arm": arm,
            "title": arm_title(arm),
            "finished": sum(bool(run.get("finished")) for run in runs),
            "clean": [over_seeds(figures, "clean_accuracy", defender) for defender in ends] or [None, None],
            "seconds": spread(run.get("seconds") for run in runs),
            "answers": spread(run.get("answers_generated") for run in runs),
            "steps": spread(map(_steps, runs)),
        }


SHARES = Scale(0.0, 1.0)


def _share_row(label: str, kind: str, found: Spread) -> Row:
    low, high = SHARES.at(found.low), SHARES.at(found.high)
    note = f"{len(found.values)} seeds, from {percent(found.low)} to {percent(found.high)}"
    return Row(label, percent(found.mean), kind, SHARES.at(found.mean), low, high, tuple(map(SHARES.at, found.values)), note)


def _price(costs: list[dict[str, Any]]) -> str:
    """What the game cost, in one sentence; empty if nothing is known."""
    row = next((row for row in costs if row["arm"] == GAME), None)
    if not row or not all(row["clean"]):
        return ""
    before, after = row["clean"]
    took = f"; a game took {clock(row['seconds'].mean)}" if row["seconds"] else ""
    return f"The price, mean over seeds: accuracy on clean pictures went from {percent(before.mean)} to {percent(after.mean)}{took}."


def _accuracy_rows(study: StudyFiles, *path: str) -> Iterator[Row]:
    """Accuracy before training, then of the last Defender of each arm."""
    started = False
    for arm in study.arms:
        figures = study.figures(arm)
        ends = _ends(figures)
        if not ends:
            continue
        if not started and (before := over_seeds(figures, *path, ends[0])):
            started = True
            yield _share_row("before training", "before", before)
        if ends[0] != ends[1] and (after := over_seeds(figures, *path, ends[1])):
            yield _share_row(arm_title(arm), arm, after)


def _accuracies(study: StudyFiles) -> list[tuple[str, Plot]]:
    """A plot for the edits of each Attacker, the last one first, and one for clean pictures."""
    everyone = {(arm, seed): figures for arm in study.arms for seed, figures in study.figures(arm).items()}
    attackers = reversed(keys_of(everyone, "accuracy_under_attack"))
    groups = [*((f"On the edits of {on}", ("accuracy_under_attack", on)) for on in attackers), ("On clean pictures", ("clean_accuracy",))]
    ticks = [(SHARES.at(value), percent(value, 0)) for value in (0.0, 0.5, 1.0)]
    plots = [(title, Plot(list(_accuracy_rows(study, *path)), ticks)) for title, path in groups]
    return [(title, plot) for title, plot in plots if plot.rows]


def _matrix(by_seed: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Heat map averaged over seeds: column names, and rows of (attacker_i, cells)."""
    attackers = keys_of(by_seed, name)
    defenders = _defenders(by_seed, name, attackers)
    cells = {on: [over_seeds(by_seed, name, on, defender) for defender in defenders] for on in attackers}
    return {"defenders": defenders, "rows": [(on, [found.cell() if found else None for found in row]) for on, row in cells.items()]}


def _defenders(by_seed: Mapping[str, Any], name: str, attackers: list[str]) -> list[str]:
    found = {defender: None for on in attackers for defender in keys_of(by_seed, name, on)}
    return keys_of({"": {"all": found}}, "all")


def _integrity(by_seed: Mapping[str, Any]) -> list[tuple[str, Spread | None, Spread | None, Spread | None]]:
    """(picture, median q, 5th percentile of q, share of true labels) over seeds."""
    return [
        (
            on,
            over_seeds(by_seed, "integrity", on, "median"),
            over_seeds(by_seed, "integrity", on, "p5"),
            over_seeds(by_seed, "label_valid", on),
        )
        for on in keys_of(by_seed, "integrity")
    ]


def _curated(by_seed: Mapping[str, Any]) -> list[tuple[str, Spread | None, Spread | None]]:
    """(round, share of true labels by the best reading, and however doubtful things are read) over seeds."""
    return [
        (name, over_seeds(by_seed, "curated_label_likely", name), over_seeds(by_seed, "curated_label_valid", name))
        for name in keys_of(by_seed, "curated_label_valid")
    ]


def _phases(study: StudyFiles) -> list[dict[str, Any]]:
    """A stacked bar an arm: mean seconds of each phase over its runs."""
    bars = []
    for arm in study.arms:
        runs = [found for seed in study.seeds if (found := study.run(arm, seed).get("seconds_by_phase"))]
        phases = [phase_seconds(run) for run in runs]
        names = dict.fromkeys(name for found in phases for name in found)
        means = {name: sum(found.get(name, (0.0, {}))[0] for found in phases) / len(phases) for name in names}
        if means:
            bars.append({"title": arm_title(arm), "parts": means, "total": sum(means.values())})
    return bars


def _links(study: StudyFiles) -> list[tuple[str, list[tuple[str, str, Mapping[str, Any]]]]]:
    """A row an arm: (seed, address of the run's page, its entry)."""
    return [(arm_title(arm), [(seed, study.link(arm, seed), study.run(arm, seed)) for seed in study.seeds]) for arm in study.arms]


def _status(study: StudyFiles) -> str:
    runs = [study.run(arm, seed) for arm in study.arms for seed in study.seeds]
    took = sum(run.get("seconds") or 0 for run in runs)
    done = f"{sum(bool(run.get('finished')) for run in runs)} of {len(runs)} runs finished"
    return done + (f" · {clock(took)} of computing in all" if took else "")


def _context(study: StudyFiles) -> dict[str, Any]:
    game, verdicts = study.figures(GAME), [verdict(comparison) for comparison in study.comparisons]
    seed, found = galleries(study)
    costs = list(_costs(study))
    return {
        "name": study.summary.get("name") or study.folder.resolve().name,
        "status": _status(study),
        "missing": list(study.unfinished()),
        "verdicts": verdicts,
        "tally": tally(verdicts),
        "arms": [(arm_title(arm), ARMS.get(arm, ("", "an arm of this study's own"))[1]) for arm in study.arms],
        "costs": costs,
        "price": _price(costs),
        "warnings": study.warnings,
        "num_seeds": len(study.seeds),
        "accuracies": _accuracies(study),
        "success": _matrix(game, "attack_success"),
        "under_attack": _matrix(game, "accuracy_under_attack"),
        "integrity": _integrity(game),
        "curated": _curated(game),
        "attack_types": mean_types(game),
        "types": TYPES,
        "seed": seed,
        "galleries": found,
        "outcomes": OUTCOMES,
        "links": _links(study),
        "seeds": study.seeds,
        "phases": _phases(study),
        "versions": study.summary.get("versions") or versions(),
        "config_hash": study.summary.get("config_hash"),
        "config_text": study.config_text,
    }


def build_study_report(folder: Path | str) -> Path:
    """Write `report.html` into a study folder, finished or not, and return its path; NotADirectoryError if there is no such folder."""
    study = read_study(folder)
    return write_page(study.folder / "report.html", "study.html", _context(study))
