"""One edit as a card: before, after and difference, with the target boxes, the question, and what the Defenders made of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from aot_fast.data.answers import parse_answer
from aot_fast.data.schema import LETTERS
from aot_fast.evaluation.tables import FOLDER, Edit, Prediction, image_path
from aot_fast.report.pictures import Picture, before_after, load_first, size_of
from aot_fast.report.run_files import RunFiles

MAX_RAW = 600
"""Characters of a raw answer kept in the page: some models write pages."""


@dataclass(frozen=True)
class Reply:
    """What was answered to one picture."""

    shown: str
    """clean | round trip | edit, or empty for a sampled answer."""
    parsed: str
    raw: str
    """Empty where it says no more than `parsed`."""
    right: bool


@dataclass(frozen=True)
class Witness:
    """A Defender and its replies."""

    name: str
    role: str
    """What it has to do with this Attacker, in words."""
    replies: tuple[Reply, ...]

    def on(self, shown: str) -> Reply | None:
        return next((reply for reply in self.replies if reply.shown == shown), None)


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
    values: tuple[tuple[str, str], ...]
    """Verdict values: (name, value)."""
    witnesses: tuple[Witness, ...] = ()
    samples: tuple[Reply, ...] = ()
    """Sampled answers of the Defender that the edit was made against."""
    attack: str = ""
    """Type of attack: one of `attacks.TYPES`, or empty if unknown."""
    audit: bool | None = None
    """Whether the true answer is still true by the scene graph."""
    audited: bool = False
    """Whether an audit belongs on this card at all."""
    labels: tuple[str, ...] = ()
    """Why the card is shown, in words."""

    @property
    def shown(self) -> list[str]:
        """Kinds of picture whose answers are told; the round trip only where the codec alone already costs somebody the answer."""
        replies = [reply for one in self.witnesses for reply in one.replies]
        told = {reply.shown for reply in replies if reply.shown != "round trip" or not reply.right}
        return [shown for shown in ("clean", "round trip", "edit") if shown in told]

    @property
    def raws(self) -> list[tuple[str, str]]:
        """Answers that say more than the letter: (who, text)."""
        told = self.shown
        spoken = [(f"{one.name}, {reply.shown}", reply.raw) for one in self.witnesses for reply in one.replies if reply.shown in told]
        spoken += [(f"sample {k}", reply.raw) for k, reply in enumerate(self.samples, start=1)]
        return [(who, text) for who, text in spoken if text]


def _reply(shown: str, parsed: str, raw: str, right: bool) -> Reply:
    said = raw.strip()
    if said in (parsed, f"\\boxed{{{parsed}}}"):
        said = ""
    return Reply(shown, parsed or "(none)", said if len(said) <= MAX_RAW else said[:MAX_RAW] + " ...", right)


def witness(name: str, role: str, tables: Mapping[str, Mapping[str, Prediction]], on: str, id: str) -> Witness | None:
    """A Defender's replies to a question; None if it has not seen the edit. `tables`: its predictions by kind of picture."""
    rows = {shown: tables.get(key, {}).get(id) for shown, key in (("clean", "clean"), ("round trip", "roundtrip"), ("edit", on))}
    if rows["edit"] is None:
        return None
    return Witness(name, role, tuple(_reply(shown, row.parsed, row.text, row.correct) for shown, row in rows.items() if row))


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


def edit_picture(run_folder: Path, on: str, edit: Edit) -> Iterator[Path]:
    """Where the picture of a held-out edit may lie."""
    if edit.image:
        yield run_folder / FOLDER / edit.image
    yield image_path(run_folder, on, edit.question_id)


def edit_card(
    run: RunFiles,
    on: str,
    edit: Edit,
    question: Mapping[str, Any],
    outcome: str,
    witnesses: tuple[Witness, ...],
    labels: tuple[str, ...] = (),
) -> Card:
    """Card of a held-out edit."""
    pictures = _pictures(run, edit.question_id, question, load_first(edit_picture(run.folder, on, edit)))
    return Card(
        id=edit.question_id,
        outcome=outcome,
        pictures=pictures,
        **_wording(question),
        values=(("q", f"{edit.q:.3f}"),),
        witnesses=witnesses,
        attack=edit.attack,
        audit=edit.audit,
        audited=True,
        labels=labels,
    )


def _sample(text: str, question: Mapping[str, Any]) -> Reply:
    parsed = parse_answer(text, tuple(question.get("options") or ()))
    return _reply("", parsed, text, parsed == question.get("answer"))


def curated_card(run: RunFiles, folder: Path, row: Mapping[str, Any], question: Mapping[str, Any]) -> Card:
    """Card of an edit that curation made and judged; `row`: its verdict."""
    shown = {"q": "q", "u": "uniqueness", "e": "efficacy", "reward": "reward"}
    return Card(
        id=row["question_id"],
        outcome="accepted" if row.get("accepted") else "rejected",
        pictures=_pictures(run, row["question_id"], question, load_first([folder / row.get("image", "")])),
        **_wording(question),
        values=tuple((name, f"{row[key]:.2f}") for name, key in shown.items() if row.get(key) is not None),
        samples=tuple(_sample(text, question) for text in row.get("answers", ())),
        attack=row.get("attack") or "",
        audit=row.get("audit"),
        audited="audit" in row,
    )
