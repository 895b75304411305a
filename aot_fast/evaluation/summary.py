"""`summary.json`: every figure of a run in one file, written whole."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aot_fast.config import Config
from aot_fast.evaluation import matrix
from aot_fast.evaluation.statistics import Share, share
from aot_fast.evaluation.tables import read_tables
from aot_fast.metrics import read_rows, write_json
from aot_fast.settings import config_hash

PACKAGES = ("aot_fast", "torch", "triton", "deepspeed", "transformers", "diffusers", "peft", "numpy", "pillow")


def versions() -> dict[str, str]:
    """Versions of python and of the packages that figures depend on; imports none of them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def steps_and_seconds(rows: list[dict[str, Any]]) -> tuple[dict[str, int], dict[str, float]]:
    """Optimizer steps and seconds of each phase over all rounds, from the rows of metrics.jsonl."""
    last_step: dict[tuple[str, int], int] = {}
    seconds: dict[str, float] = {}
    for row in rows:
        key = (row["phase"], row["round"])
        last_step[key] = max(last_step.get(key, 0), row["step"])
        seconds[row["phase"]] = seconds.get(row["phase"], 0.0) + row["seconds"]
    steps: dict[str, int] = {}
    for (phase, _), step in last_step.items():
        steps[phase] = steps.get(phase, 0) + step
    return steps, seconds


def _walk(tree: dict[str, Any], leaf) -> dict[str, Any]:
    return {key: leaf(value) if isinstance(value, Share) else _walk(value, leaf) for key, value in tree.items()}


def curated_labels(run_folder: Path | str, verdict: str) -> dict[str, Share]:
    """By round: share of the edits in the curated set whose answer is still true by the audit's `verdict` ("audit": surely, or "likely").

    Rounds without an audited edit are left out.
    """
    folders = sorted(Path(run_folder).glob("curated/round_[0-9]*"))
    audits = {(folder.name, Path(row["image"]).name): row.get(verdict) for folder in folders for row in read_rows(folder / "edits.jsonl")}
    shares = {}
    for folder in folders:
        # A replayed edit lies in an earlier round's folder; names, not whole paths, for a run folder may be moved.
        pictures = [Path(row["path"]) for row in read_rows(folder / "set.jsonl") if row["source"] == "edit"]
        found = [audits.get((path.parent.parent.name, path.name)) for path in pictures]
        valid = share(audit for audit in found if audit is not None)
        if valid.n:
            shares[f"round_{int(folder.name.removeprefix('round_'))}"] = valid
    return shares


def measure(run_folder: Path | str, q_low: float) -> dict[str, Any]:
    """The figures of MATH.md section 5 from the tables that exist so far.

    Plain names hold plain numbers (None where nothing could be counted); `details` has the same tree with {value, n, low, high}, and
    `by_kind` once more for each kind of question.
    """
    tables = read_tables(run_folder)
    shares = matrix.shares(tables, q_low)
    learned = matrix.attacker_difference(tables, q_low)
    for name, found, verdict in (("label_valid", matrix.label_valid, "audit"), ("label_likely", matrix.label_likely, "likely")):
        by_attacker = {on: found(tables.edits[on], q_low) for on in tables.attackers}
        shares[name] = {on: valid for on, valid in by_attacker.items() if valid.n}
        shares[f"curated_{name}"] = curated_labels(run_folder, verdict)
    shares["attack_types"] = matrix.attack_types(tables, q_low)
    return {
        **_walk(shares, lambda share: share.value),
        "integrity": {on: matrix.integrity(edits).to_json() for on, edits in sorted(tables.edits.items())},
        "forgetting": matrix.forgetting(tables),
        "difference_of_defenders": {on: value.to_json() for on, value in matrix.defender_differences(tables).items()},
        "difference_of_attackers": learned.to_json() if learned else None,
        "details": _walk(shares, Share.to_json),
        "by_kind": {kind: _walk(matrix.shares(tables, q_low, kind), Share.to_json) for kind in matrix.kinds(tables)},
    }


def summarise(run_folder: Path | str, config: Config, seconds: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Write `summary.json` of a run, finished or not, and return it. `seconds`: a `Spans`' totals; else from metrics.jsonl."""
    run_folder = Path(run_folder)
    steps, step_seconds = steps_and_seconds(read_rows(run_folder / "metrics.jsonl"))
    entry = {
        "seed": config.run.seed,
        "arm": config.game.arm,
        "q_low": config.reward.q_low,
        **measure(run_folder, config.reward.q_low),
        "steps": steps,
        "seconds": dict(seconds) if seconds else step_seconds,
    }
    summary = {"name": config.run.name, "seeds": [entry], "config_hash": config_hash(config), "versions": versions()}
    write_json(run_folder / "summary.json", summary)
    return summary
