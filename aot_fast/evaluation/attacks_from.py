"""The held-out round trips and edits of another run, copied so that this run's Defenders answer the very same attacks (MATH.md section 5).

A control is compared with the game under the game's Attackers, which it never meets in training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path

from aot_fast.config import Config
from aot_fast.evaluation.tables import FOLDER, edits_path, image_path, predictions_path, read_edits
from aot_fast.metrics import atomic_write_text
from aot_fast.run_folder import FINISHED
from aot_fast.settings import load

FIELD = "evaluation.attacks_from"


def copy_attacks(config: Config, run_folder: Path, clean: Collection[str], attacked: Collection[str]) -> list[str]:
    """Copy tables and pictures from the run `evaluation.attacks_from` into `run_folder`; returns attacker_0 to attacker_n.

    `clean`, `attacked`: ids of this run's held-out questions, and of those that Attackers edit. A table that is there already is kept.
    Raises ValueError unless the other run is finished and has the same held-out questions and q_low.
    """
    other = Path(config.evaluation.attacks_from)
    theirs = _settings_of(other)
    if theirs.reward.q_low != config.reward.q_low:
        raise ValueError(
            f"{FIELD} = {str(other)!r}: has reward.q_low = {theirs.reward.q_low}, this run {config.reward.q_low}: "
            "the same edits would count as attacks in one and not in the other; set the same q_low"
        )
    try:
        _check_questions(other, run_folder)
        return _copy_tables(config, theirs, other, run_folder, clean, attacked)
    except OSError as error:  # a picture or table was taken away: said on every rank, as a ValueError is
        raise ValueError(f"{FIELD} = {str(other)!r}: cannot be copied: {error}") from error


def _copy_tables(
    config: Config, theirs: Config, other: Path, run_folder: Path, clean: Collection[str], attacked: Collection[str]
) -> list[str]:
    paths = sorted((other / FOLDER).glob("edits_attacker_*.jsonl"), key=lambda path: int(path.stem.rpartition("_")[2]))
    names = [path.stem.removeprefix("edits_") for path in paths]
    for on, ids in [("roundtrip", clean), *((name, attacked) for name in names)]:
        _copy_edits(other, run_folder, on, ids)
    if _same_first_defender(config, theirs):
        for on in ("clean", "roundtrip", *names):
            _copy(predictions_path(other, 0, on), predictions_path(run_folder, 0, on))
    return names


def _settings_of(other: Path) -> Config:
    if not (other / "config.yaml").is_file():
        raise ValueError(f"{FIELD} = {str(other)!r}: holds no config.yaml; give the folder of a run, such as runs/tiny")
    if not (other / FINISHED).is_file():
        raise ValueError(f"{FIELD} = {str(other)!r}: that run is not finished; play it to its end first")
    return load(str(other / "config.yaml"))


def _check_questions(other: Path, run_folder: Path) -> None:
    """Ids, texts, answers and target boxes of the held-out questions must agree."""
    mine, theirs = (_questions(folder / "data" / "heldout.jsonl") for folder in (run_folder, other))
    different = [id for id in mine | theirs if mine.get(id) != theirs.get(id)]
    if different:
        raise ValueError(
            f"{FIELD} = {str(other)!r}: has other held-out questions: {len(different)} of {len(mine | theirs)} differ, "
            f"the first is {different[0]!r}; give both runs the same data.* settings"
        )


def _questions(path: Path) -> dict[str, dict]:
    lines = path.read_text(encoding="utf-8").split("\n")[1:]  # the first line says where this run's images lie
    return {record["id"]: record for record in map(json.loads, filter(None, lines))}


def _copy_edits(other: Path, run_folder: Path, on: str, ids: Collection[str]) -> None:
    """Pictures first: where a table is, its pictures are whole."""
    source, target = edits_path(other, on), edits_path(run_folder, on)
    if target.is_file():
        return
    edits = read_edits(source)
    if edits.keys() != set(ids):
        raise ValueError(
            f"{FIELD} = {str(other)!r}: {source.name} has {len(edits)} held-out questions, this run {len(ids)}, "
            f"{len(edits.keys() & set(ids))} of them common; use the same evaluation.num_questions and evaluation.num_attacked"
        )
    for name in ("clean", on):
        image_path(run_folder, name, "x").parent.mkdir(parents=True, exist_ok=True)
        for id in edits:
            shutil.copyfile(image_path(other, name, id), image_path(run_folder, name, id))
    _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    if source.is_file() and not target.is_file():
        atomic_write_text(target, source.read_text(encoding="utf-8"))


def _same_first_defender(config: Config, theirs: Config) -> bool:
    """Whether Defender 0 of both runs gives the same greedy answers: the same model, untrained, asked in the same way.

    Its tables are then copied: answering again would cost time and give the same rows.
    """
    same = (config.defender, config.engine.precision, config.kernels) == (theirs.defender, theirs.engine.precision, theirs.kernels)
    return same and config.game.warmup_steps == theirs.game.warmup_steps == 0
