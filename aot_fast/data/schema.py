"""The records that pass between data, players and report, and the two prompts that define the game.

Boxes are [x, y, w, h] in pixels of the image after its EXIF rotation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Question:
    """A question about one image, with the objects that decide its answer."""

    id: str
    """Unique in its file."""
    image: str
    """Path of the image, relative to the image folder or absolute."""
    question: str
    """The question without its options."""
    answer: str
    """A letter when there are options, else the answer's text."""
    options: tuple[str, ...] = ()
    """Options in the order in which they are lettered."""
    target_boxes: tuple[Box, ...] = ()
    """The objects that decide the answer."""
    target_names: tuple[str, ...] = ()
    """Names of the targets, asked for by the uniqueness judge; may be empty."""
    kind: str = ""
    """Free label such as `relation`; accuracy is also reported by kind."""
    scene: dict[str, Any] | None = None
    """The scene graph of a rendered picture (`data/scenes.py`); None for photographs."""

    @property
    def key(self) -> str:
        """Hash of everything a prompt is made of: the group key of advantages (DESIGN.md rule 6), never a truncated text."""
        text = json.dumps([self.id, self.image, self.question, self.options], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Example:
    """A question with the picture it is asked about: the original, a codec round trip, or an edit."""

    question: Question
    image: Image
    """RGB, upright."""
    source: str = "clean"
    """clean | roundtrip | edit."""
    attacker_round: int = -1
    """The round of the Attacker that made the edit; -1 for a picture that no Attacker touched."""

    @property
    def key(self) -> str:
        """Hash of prompt and image bytes."""
        digest = hashlib.sha256(self.question.key.encode())
        digest.update(repr(self.image.size).encode())
        digest.update(self.image.tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Verdict:
    """What the reward found out about one edit (MATH.md section 4)."""

    question_id: str
    prompt: str
    seed: int
    attacker_round: int
    integrity: tuple[float, ...]
    """SSIM in each target box, in [-1, 1]."""
    ramp: float
    """w(q) in [0, 1] with q the least of `integrity`."""
    uniqueness: float
    """1 if no second instance of a target was added, else 0."""
    efficacy: float
    """Fraction of the Defender's trials that were wrong, in [0, 1]."""
    answers: tuple[str, ...]
    """The Defender's raw answers on the edit."""
    reward: float
    accepted: bool
    """Whether the curated set may take the edit."""

    @property
    def q(self) -> float:
        return min(self.integrity)


def question_text(question: str, options: Sequence[str] | None) -> str:
    """The user's turn of the Defender's prompt; the answer is asked for in `\\boxed{}` as AOT's released reward expects."""
    lines = [question]
    lines += [f"{letter}. {option}" for letter, option in zip(LETTERS, options or ())]
    lines.append("Answer with the option's letter in \\boxed{}." if options else "Put the answer in \\boxed{}.")
    return "\n".join(lines)


def edit_prompt(question: str) -> str:
    """The Attacker's instruction, word for word as AOT published it (AOT_FACTS: "Edit prompt")."""
    return f"Add a plausible distractor object, inspired by the question, to mislead a model answering: {question}"


@dataclass(frozen=True)
class Answer:
    """One answer of the Defender."""

    text: str
    """As generated, special tokens removed."""
    parsed: str
    """The letter or text taken from it; empty if there is none."""
    correct: bool
