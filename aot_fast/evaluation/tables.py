"""The two tables that an evaluation leaves behind, one JSON row a line; every figure of the game is computed from them alone.

evaluation/predictions_defender_{j}_{on}.jsonl    on: clean | roundtrip | attacker_{i}
evaluation/edits_attacker_{i}.jsonl               and edits_roundtrip.jsonl: what the codec alone does
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from aot_fast.metrics import atomic_write_text

FOLDER = "evaluation"
PREDICTIONS = re.compile(r"predictions_defender_(?P<defender>\d+)_(?P<on>clean|roundtrip|attacker_\d+)\.jsonl")
EDITS = re.compile(r"edits_(?P<on>roundtrip|attacker_\d+)\.jsonl")


@dataclass(frozen=True)
class Prediction:
    """A Defender's greedy answer to a held-out question."""

    question_id: str
    on: str
    """clean | roundtrip | attacker_{i}: the picture it saw."""
    text: str
    parsed: str
    correct: bool
    truth: str
    kind: str = ""


@dataclass(frozen=True)
class Edit:
    """An Attacker's edit of a held-out question's image, or its round trip through the codec."""

    question_id: str
    q: float
    """Least SSIM over the target boxes, in [-1, 1]."""
    integrity: tuple[float, ...] = ()
    """SSIM in each target box."""
    image: str = ""
    """Path of the picture relative to the folder `evaluation`."""
    audit: bool | None = None
    """Whether the true answer is still true however doubtful things in the picture are read; None without a scene graph (photographs)."""
    attack: str = ""
    """Attack type, one of `data.audit.KINDS`; empty where there is no audit."""
    likely: bool | None = None
    """Whether the true answer is still true by the best reading of each of those things."""


def safe_name(id: str) -> str:
    """A file name for an id of any text: the id itself if it is harmless, else its harmless letters and a hash of the whole."""
    if re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,79}", id):
        return id
    return re.sub(r"[^A-Za-z0-9_-]+", "_", id)[:48] + "-" + hashlib.sha256(id.encode()).hexdigest()[:12]


def predictions_path(run_folder: Path | str, defender: int, on: str) -> Path:
    return Path(run_folder) / FOLDER / f"predictions_defender_{defender}_{on}.jsonl"


def edits_path(run_folder: Path | str, on: str) -> Path:
    """`on`: attacker_{i} or roundtrip."""
    return Path(run_folder) / FOLDER / f"edits_{on}.jsonl"


def image_path(run_folder: Path | str, on: str, question_id: str) -> Path:
    """Where the picture of a question lies that was shown as `on` (clean | attacker_{i})."""
    return Path(run_folder) / FOLDER / "images" / on / f"{safe_name(question_id)}.png"


def write_table(path: Path | str, rows: Iterable[Prediction] | Iterable[Edit]) -> None:
    """Write a whole table or, under any fault, none."""
    atomic_write_text(path, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows))


def _read(path: Path, record: type) -> dict[str, Any]:
    """Rows of a table by question id; unknown keys are left to newer versions, a second row of a question is an error."""
    names = {item.name for item in fields(record)}
    table: dict[str, Any] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(line).items() if key in names}
        row = record(**values)
        if row.question_id in table:
            raise ValueError(f"{path}:{number}: question_id: {row.question_id!r} has a row already; write the table once")
        table[row.question_id] = row
    return table


def read_predictions(path: Path | str) -> dict[str, Prediction]:
    return _read(Path(path), Prediction)


def read_edits(path: Path | str) -> dict[str, Edit]:
    return _read(Path(path), Edit)


@dataclass(frozen=True)
class Tables:
    """All tables of a run, rows by question id."""

    predictions: dict[int, dict[str, dict[str, Prediction]]] = field(default_factory=dict)
    """[defender][on][question id]."""
    edits: dict[str, dict[str, Edit]] = field(default_factory=dict)
    """[on][question id]."""

    @property
    def defenders(self) -> list[int]:
        return sorted(self.predictions)

    @property
    def attackers(self) -> list[str]:
        """attacker_0, attacker_1, ... in the order of the rounds."""
        return sorted((on for on in self.edits if on != "roundtrip"), key=lambda on: int(on.removeprefix("attacker_")))


def read_tables(run_folder: Path | str) -> Tables:
    """The tables that exist so far; empty for a run that has evaluated nothing."""
    folder, tables = Path(run_folder) / FOLDER, Tables()
    for path in sorted(folder.glob("*.jsonl")):
        if match := PREDICTIONS.fullmatch(path.name):
            tables.predictions.setdefault(int(match["defender"]), {})[match["on"]] = read_predictions(path)
        elif match := EDITS.fullmatch(path.name):
            tables.edits[match["on"]] = read_edits(path)
    return tables
