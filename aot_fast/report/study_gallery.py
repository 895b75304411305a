"""The pictures of a study: the game of its first seed, with what the controls' Defenders answered on the same edits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from aot_fast.evaluation.tables import Tables, read_tables
from aot_fast.report.cards import Witness, edit_picture, witness
from aot_fast.report.gallery import Gallery, Others, gallery
from aot_fast.report.run_files import RunFiles, read_run
from aot_fast.report.study_files import GAME, StudyFiles, arm_title

COUNTS_LAST, COUNTS_EARLIER = (6, 6, 6), (4, 2, 0)
"""Hardest edits, failures and mix shown of the last Attacker and of each earlier one: some 40 cards, under 2 MB at 64 px."""


def _others(study: StudyFiles, run: RunFiles, seed: str) -> Others:
    """Replies of the controls' last Defenders to an edit, where they saw the very same picture."""
    folders = {arm: folder for arm in study.arms if arm != GAME and (folder := study.run_folder(arm, seed))}
    tables = {arm: read_tables(folder) for arm, folder in folders.items()}

    def replies(on: str, id: str) -> Iterator[Witness]:
        for arm, found in tables.items():
            if found.defenders and _same_edit(run, folders[arm], found, on, id):
                last = found.defenders[-1]
                if seen := witness(f"defender_{last}", f"of the {arm_title(arm)}", found.predictions[last], on, id):
                    yield seen

    return replies


def _same_edit(run: RunFiles, folder: Path, tables: Tables, on: str, id: str) -> bool:
    """Whether a control's run has the same picture under this name; with no edits of its own it answered this run's."""
    if on not in tables.edits:
        return True
    theirs = tables.edits[on].get(id)
    mine = next((path for path in edit_picture(run.folder, on, run.tables.edits[on][id]) if path.is_file()), None)
    copy = next((path for path in edit_picture(folder, on, theirs) if path.is_file()), None) if theirs else None
    return bool(mine and copy) and mine.read_bytes() == copy.read_bytes()


def galleries(study: StudyFiles) -> tuple[str, list[Gallery]]:
    """The first seed whose game is there, and its galleries, last Attacker first."""
    seed = next((seed for seed in study.seeds if study.run_folder(GAME, seed)), "")
    if not seed:
        return "", []
    run = read_run(study.run_folder(GAME, seed))
    others, attackers = _others(study, run, seed), list(reversed(run.tables.attackers))
    return seed, [gallery(run, on, COUNTS_LAST if k == 0 else COUNTS_EARLIER, others) for k, on in enumerate(attackers)]
