"""Cards of edits: before, after and difference, with the target boxes, the question, and what the Defenders made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from aot_fast.data.schema import LETTERS
from aot_fast.evaluation.matrix import attackable
from aot_fast.evaluation.tables import FOLDER, Edit, image_path
from aot_fast.report.pictures import Picture, before_after, load_first, size_of
from aot_fast.report.run_files import RunFiles, read_questions_of


@dataclass(frozen=True)
class Card:
    """One edit."""

    id: str
    outcome: str
    pictures: tuple[Picture, ...]
    question: str
    options: tuple[tuple[str, str, bool], ...]
    """(letter, text, whether it is the truth)."""
    truth: str
    answers: tuple[tuple[str, str, str, bool | None], ...]
    """(who on which picture, parsed, raw text, right or wrong)."""
    values: tuple[tuple[str, str], ...]
    """Verdict values: (name, value)."""


def _pictures(run: RunFiles, id: str, question: Mapping[str, Any], after: Image.Image | str) -> tuple[Picture, ...]:
    """The question's picture beside `after`: as the evaluation kept it, which may be smaller than the original that the boxes belong to."""
    original = Path(question.get("images", "")) / question.get("image", "")
    before = load_first([image_path(run.folder, "clean", id), original])
    return before_after(before, after, question.get("target_boxes", ()), size_of(original))


def _wording(question: Mapping[str, Any]) -> dict[str, Any]:
    letters = zip(LETTERS, question.get("options") or ())
    return {
        "question": question.get("question", "(the question is not in this run's data folder)"),
        "options": tuple((letter, option, letter == question.get("answer")) for letter, option in letters),
        "truth": question.get("answer", "?"),
    }


def _outcome(run: RunFiles, on: str, edit: Edit, opponent: int) -> str:
    """fooled | resisted | rejected | void (the Defender fails without the attack) of an edit, seen by the Attacker's opponent."""
    if edit.audit is False or edit.q < run.q_low:
        return "rejected"
    rows = run.tables.predictions.get(opponent, {})
    if edit.question_id not in attackable(rows.get("roundtrip", {}), {edit.question_id: edit}, run.q_low):
        return "void"
    row = rows.get(on, {}).get(edit.question_id)
    return "void" if row is None else "resisted" if row.correct else "fooled"


def _witnesses(run: RunFiles, attacker: int) -> list[int]:
    """The Defender that the Attacker trained against, and the one that then trained against the Attacker."""
    wanted = (max(attacker - 1, 0), max(attacker, 1))
    return [j for j in dict.fromkeys((*wanted, *run.tables.defenders[-1:])) if j in run.tables.predictions][:2]


def _answers(run: RunFiles, on: str, id: str, witnesses: list[int]) -> Iterator[tuple[str, str, str, bool | None]]:
    for defender in witnesses:
        for shown, words in (("clean", "clean"), ("roundtrip", "round trip"), (on, "edit")):
            row = run.tables.predictions[defender].get(shown, {}).get(id)
            # The round trip is of interest only where the codec already costs the answer.
            if row and not (shown == "roundtrip" and row.correct):
                yield f"defender_{defender}, {words}", row.parsed or "(none)", row.text, row.correct


def _choose(outcomes: Mapping[str, str], count: int) -> list[str]:
    """Ids for the gallery: half of them fooled, a quarter resisted, the rest rejected or void, each the first in the table's order."""
    shares = {"fooled": count // 2, "resisted": count // 4, "rejected": max(1, count // 8), "void": max(1, count // 8)}
    chosen = [id for wanted, share in shares.items() for id in islice((id for id, found in outcomes.items() if found == wanted), share)]
    rest = (id for id in outcomes if id not in chosen)
    return sorted([*chosen, *islice(rest, max(0, count - len(chosen)))], key=lambda id: list(shares).index(outcomes[id]))[:count]


def attacker_cards(run: RunFiles, on: str) -> tuple[list[Card], dict[str, int], str]:
    """Cards of an Attacker's held-out edits, how many of its edits had each outcome, and the name of its opponent."""
    edits, witnesses = run.tables.edits[on], _witnesses(run, int(on.removeprefix("attacker_")))
    outcomes = {id: _outcome(run, on, edit, witnesses[0] if witnesses else 0) for id, edit in edits.items()}
    ids = _choose(outcomes, run.num_gallery)
    questions = read_questions_of(run.folder, set(ids))
    cards = []
    for id in ids:
        edit, question = edits[id], questions.get(id, {})
        after = load_first([run.folder / FOLDER / edit.image, image_path(run.folder, on, id)])
        values = [("q", f"{edit.q:.3f}"), ("audit", {True: "still true", False: "no longer true", None: "none"}[edit.audit])]
        answers, pictures = tuple(_answers(run, on, id, witnesses)), _pictures(run, id, question, after)
        cards.append(Card(id, outcomes[id], pictures, **_wording(question), answers=answers, values=tuple(values)))
    counts = {name: list(outcomes.values()).count(name) for name in ("fooled", "resisted", "rejected", "void")}
    return cards, counts, f"defender_{witnesses[0]}" if witnesses else ""


def _curated_card(run: RunFiles, folder: Path, row: Mapping[str, Any], question: Mapping[str, Any]) -> Card:
    id, after = row["question_id"], load_first([folder / row.get("image", "")])
    shown = {"q": "q", "w(q)": "ramp", "u": "uniqueness", "e": "efficacy", "reward": "reward"}
    values = tuple((name, f"{row[key]:.2f}") for name, key in shown.items() if row.get(key) is not None)
    answers = tuple(("sampled answer", text.strip(), text, None) for text in dict.fromkeys(row.get("answers", ())))
    outcome = "accepted" if row.get("accepted") else "rejected"
    return Card(id, outcome, _pictures(run, id, question, after), **_wording(question), answers=answers[:4], values=values)


def curated_cards(run: RunFiles, round: int) -> list[Card]:
    """Cards of a curated set: the first accepted and the first rejected edits, half of each where there are so many."""
    half, curated = max(1, run.num_gallery // 4), run.curated[round]
    rows = [row for row in curated.edits if "question_id" in row]
    chosen = [*islice((row for row in rows if row.get("accepted")), half), *islice((row for row in rows if not row.get("accepted")), half)]
    questions = read_questions_of(run.folder, {row["question_id"] for row in chosen})
    return [_curated_card(run, curated.folder, row, questions.get(row["question_id"], {})) for row in chosen]
