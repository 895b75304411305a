"""`summary.json` of a study: what every run cost, its figures, and the comparisons over arms and seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aot_fast.evaluation.comparisons import comparisons
from aot_fast.evaluation.summary import steps_and_seconds, versions
from aot_fast.evaluation.tables import read_tables
from aot_fast.metrics import read_rows, write_json
from aot_fast.settings import config_hash
from aot_fast.study.plan import Study, StudyRun, read_study

PHASES = ("load", "warmup", "attack", "curate", "defend", "evaluate")
"""Spans that follow each other: their sum is the run's time."""
TRAINING = ("warmup", "defend")
"""Phases that train the Defender."""
WORK = ("answers_generated", "optimizer_steps")
"""What all arms must do as much of (MATH.md section 5)."""
FIGURES = (
    "clean_accuracy",
    "attack_success",
    "accuracy_under_attack",
    "integrity",
    "label_valid",
    "label_likely",
    "attack_types",
    "curated_label_valid",
    "curated_label_likely",
)


def publish_study(folder: Path, say: bool = False) -> Path | None:
    """Write `summary.json` and `report.html` of the study; returns the report. A failure is said and costs no run. `say`: print both."""
    try:
        summary = summarise_study(folder)
        for line in describe(summary) if say else ():
            print(line, flush=True)
        from aot_fast.report.study import build_study_report  # matplotlib

        report = build_study_report(folder)
        if say:
            print(f"report: {report}", flush=True)
        return report
    except Exception as error:  # hours of training must not end in a plot
        print(f"warning: the study's report was not written: {type(error).__name__}: {error}; try `aot-fast report {folder}`", flush=True)
        return None


def summarise_study(folder: Path) -> dict[str, Any]:
    """Write `summary.json` of the study in `folder`, of what is finished so far, and return it."""
    study = read_study(folder)
    runs = study.runs()
    costs = {run: cost(study, run) for run in runs}
    tables: dict[str, dict[int, Any]] = {}
    for run in runs:
        if run.finished:
            tables.setdefault(run.arm, {})[run.seed] = read_tables(run.folder)
    found = comparisons(tables, study.config.reward.q_low, study.config.game.rounds)
    summary = {
        "name": study.config.run.name,
        "config_hash": config_hash(study.config),
        "versions": versions(),
        "arms": list(study.arms),
        "seeds": list(study.seeds),
        "runs": _by_arm(costs),
        "warnings": unequal(costs),
        "comparisons": [comparison.to_json() for comparison in found],
        "figures": _by_arm({run: figures(run) for run in runs if run.finished}),
    }
    write_json(folder / "summary.json", summary)
    return summary


def _by_arm(values: dict[StudyRun, Any]) -> dict[str, dict[str, Any]]:
    tree: dict[str, dict[str, Any]] = {}
    for run, value in values.items():
        tree.setdefault(run.arm, {})[str(run.seed)] = value
    return tree


def _entry(run: StudyRun) -> dict[str, Any]:
    """What the run's own summary says; empty of a run that has none yet."""
    path = run.folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8"))["seeds"][0] if path.is_file() else {}


def figures(run: StudyRun) -> dict[str, Any]:
    entry = _entry(run)
    return {name: entry[name] for name in FIGURES if name in entry}


def cost(study: Study, run: StudyRun) -> dict[str, Any]:
    """Seconds, answers that the Defender's training has generated, and the Defender's optimizer steps."""
    rows = read_rows(run.folder / "metrics.jsonl")
    steps, step_seconds = steps_and_seconds(rows)
    spans = _entry(run).get("seconds") or step_seconds
    seconds = {phase: spans[phase] for phase in PHASES if phase in spans}
    return {
        "folder": str(run.folder),
        "finished": run.finished,
        "seconds": sum(seconds.values()),
        "seconds_by_phase": seconds,
        "answers_generated": answers_generated(study, rows),
        "optimizer_steps": sum(steps.get(phase, 0) for phase in TRAINING),
    }


def answers_generated(study: Study, rows: list[dict[str, Any]]) -> int | None:
    """Answers drawn for the Defender's training; None where not every step was logged."""
    config = study.config
    if config.metrics.every != 1:
        return None
    # The steps of one rollout all carry its counts.
    firsts = [row for row in rows if row["phase"] in TRAINING and (row["step"] - 1) % config.defender.steps_per_rollout == 0]
    return round(sum(float(row.get("groups/drawn", 0)) for row in firsts)) * config.defender.group_size


def unequal(costs: dict[StudyRun, dict[str, Any]]) -> list[str]:
    """A line for each kind of work that is not the same in all finished runs (MATH.md section 5)."""
    lines = []
    for kind in WORK:
        counts = {run.name: value[kind] for run, value in costs.items() if value["finished"]}
        if len(set(counts.values())) > 1 or None in counts.values():
            listed = ", ".join(f"{name} {count}" for name, count in counts.items())
            lines.append(f"warning: {kind} is not known to be equal in all runs, so that their comparison is not one of training: {listed}")
    return lines


def describe(summary: dict[str, Any]) -> list[str]:
    """The summary in lines."""
    lines = [f"{kind}: {listed}" for kind, listed in _work(summary["runs"]).items() if listed] + summary["warnings"]
    for row in summary["comparisons"]:
        pooled = row["pooled"]
        change = pooled["difference"]
        goal = "" if row["goal"] is None else f", goal {row['goal']:+.2f} {'reached' if row['reached'] else 'not reached'}"
        lines.append(
            f"{row['title']}: {pooled['old']:.3f} -> {pooled['new']:.3f}, difference {change['value']:+.3f} "
            f"[{change['low']:+.3f}, {change['high']:+.3f}] n = {change['n']}{goal}"
        )
    return lines


def _work(runs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What each finished run did, by kind of work."""
    done = {f"{arm}_seed{seed}": run for arm, seeds in runs.items() for seed, run in seeds.items() if run["finished"]}
    return {kind: ", ".join(f"{name} {run[kind]}" for name, run in done.items()) for kind in WORK}
