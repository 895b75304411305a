"""What a run folder holds, finished or not; whatever is missing or torn is listed instead of raised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from aot_fast.config import EvaluationConfig, GameConfig, RewardConfig
from aot_fast.evaluation.summary import measure, steps_and_seconds
from aot_fast.evaluation.tables import Tables, read_tables
from aot_fast.metrics import read_rows


@dataclass(frozen=True)
class Curated:
    """What a round's curation made."""

    folder: Path
    edits: list[dict[str, Any]]
    """Verdicts with the path of the picture in `folder`; NaN is None."""


@dataclass
class RunFiles:
    """The records of a run that the report is made of."""

    folder: Path
    config: dict[str, Any]
    config_text: str
    rows: list[dict[str, Any]]
    """Rows of metrics.jsonl."""
    summary: dict[str, Any]
    figures: dict[str, Any]
    """The figures of MATH.md section 5 (`evaluation.summary.measure`)."""
    tables: Tables
    curated: dict[int, Curated]
    """By round."""
    bad_samples: list[dict[str, Any]]
    exit: dict[str, Any]
    """Code and reason of the end of the last launch; empty if the run went on after it."""
    finished: bool
    missing: list[str] = field(default_factory=list)
    """What the report would show but the run has not written yet, in words."""

    @property
    def q_low(self) -> float:
        return (self.config.get("reward") or {}).get("q_low", RewardConfig.q_low)

    @property
    def arm(self) -> str:
        return (self.config.get("game") or {}).get("arm", GameConfig.arm)

    @property
    def all_played(self) -> bool:
        """Whether the Defender of the last round is evaluated: true a moment before the run is marked as finished."""
        rounds = (self.config.get("game") or {}).get("rounds", GameConfig.rounds)
        return bool(self.tables.defenders) and self.tables.defenders[-1] >= rounds

    @property
    def num_gallery(self) -> int:
        return (self.config.get("evaluation") or {}).get("gallery", EvaluationConfig.gallery)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by span; of an unfinished run, by phase of the logged steps."""
        seeds = self.summary.get("seeds") or [{}]
        return seeds[0].get("seconds") or steps_and_seconds(self.rows)[1]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none, or it is torn."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def _last_exit(folder: Path) -> dict[str, Any]:
    """`exit.json`, unless a later launch has begun: that one has cut metrics.jsonl back, or written to it."""
    exit, metrics = folder / "exit.json", folder / "metrics.jsonl"
    if exit.is_file() and metrics.is_file() and exit.stat().st_mtime_ns < metrics.stat().st_mtime_ns:
        return {}
    return read_json(exit)


def read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Text and content of a YAML file; empty if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, yaml.safe_load(text) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return "", {}


def _missing(run: RunFiles) -> Iterator[str]:
    if not run.config:
        yield "config.yaml: the settings are unknown"
    if not run.rows:
        yield "metrics.jsonl: no optimizer step is logged yet, so there are no curves"
    if not run.tables.predictions:
        yield "evaluation/predictions_*.jsonl: nothing is evaluated yet, so there are no figures"
    elif len(run.tables.defenders) < 2:
        yield "only one Defender is evaluated, so nothing can be said about what training changed"
    if not run.tables.attackers:
        yield "evaluation/edits_attacker_*.jsonl: no Attacker is evaluated yet, so there is no matrix and no gallery"
    if "roundtrip" not in run.tables.edits:
        yield "evaluation/edits_roundtrip.jsonl: the codec's own damage to the targets is unknown"


def read_run(folder: Path | str) -> RunFiles:
    """Everything that the report needs; NotADirectoryError if there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: there is no such run folder")
    text, config = read_config(folder / "config.yaml")
    curated = {
        int(path.parent.name.removeprefix("round_")): Curated(path.parent, read_rows(path))
        for path in folder.glob("curated/round_[0-9]*/edits.jsonl")
    }
    run = RunFiles(
        folder=folder,
        config=config,
        config_text=text,
        rows=read_rows(folder / "metrics.jsonl"),
        summary=read_json(folder / "summary.json"),
        figures={},
        tables=read_tables(folder),
        curated=dict(sorted(curated.items())),
        bad_samples=read_rows(folder / "bad_samples.jsonl"),
        exit=_last_exit(folder),
        finished=(folder / "FINISHED").is_file(),
    )
    # Measured anew: a summary may be older than the tables.
    run.figures = measure(folder, run.q_low)
    run.missing = list(_missing(run))
    return run


def read_questions_of(folder: Path, ids: set[str]) -> dict[str, dict[str, Any]]:
    """The run's questions with these ids, each with the folder of its image under "images"; the files may be long, so line by line."""
    found: dict[str, dict[str, Any]] = {}
    for name in ("heldout", "train"):
        path = folder / "data" / f"{name}.jsonl"
        if not path.is_file():
            continue
        with path.open(encoding="utf-8", newline="\n") as lines:
            images = json.loads(next(lines, "{}")).get("images", "")
            for record in map(json.loads, lines):
                if record["id"] in ids:
                    found.setdefault(record["id"], {**record, "images": images})
    return found
