"""Uniqueness: did the edit add a second instance of a target? SSIM on the boxes cannot see that (MATH.md section 4)."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from PIL.Image import Image, Resampling

from aot_fast.config import RewardConfig
from aot_fast.data.schema import Answer, Example, Question
from aot_fast.engine import seed_of

Answerer = Callable[[Sequence[Example], int, float, Sequence[int]], list[list[Answer]]]
"""answerer(examples, trials, temperature, seeds) -> `trials` answers to each example (temperature 0: greedy)."""

Likelihood = Callable[[Sequence[Example], Sequence[Example]], list[float]]
"""likelihood(originals, edited) -> probability that the answer to each original is given again on the edited picture."""


@dataclass(frozen=True)
class Edit:
    """One edited picture, to be judged."""

    example: Example
    """The question with its original picture."""
    image: Image
    """RGB, at the Attacker's target resolution."""
    prompt: str
    """What the Attacker was told."""
    seed: int
    """Of the sample; the trials' seeds derive from it."""
    attacker_round: int


Judge = Callable[[Sequence[Edit]], list[float]]
"""1 for each edit that kept its targets unique, else 0."""

COUNTS = ("0", "1", "2", "3 or more")


def load_judge(config: RewardConfig, answerer: Answerer) -> Judge | None:
    """The judge that `config.judge` names; None: off. `answerer` is the frozen first Defender. Raises ValueError."""
    if config.judge == "off":
        return None
    if config.judge == "defender":
        return CountingJudge(answerer, config.judge_answers)
    module, _, function = config.judge.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward.judge = {config.judge!r}: expected defender, off, or module:function ({error})") from error


class CountingJudge:
    """Asks how many of each target there are, in the original and in the edit, and compares the answers.

    answers: the question itself must be answered rightly on the edit too; from the Defender under attack that would forbid exactly the
    edits that fool it. Questions without `target_names` are not counted for, with a warning said once.
    """

    def __init__(self, answerer: Answerer, answers: bool = False):
        self.answerer = answerer
        self.answers = answers
        self.unjudged = 0

    def __call__(self, edits: Sequence[Edit]) -> list[float]:
        """1.0 where every target is counted alike in both pictures (and the answer is given, with `answers`), else 0.0."""
        self._warn(sum(not edit.example.question.target_names for edit in edits))
        originals: dict[tuple[str, str], Example] = {}  # a group shares its original: counted once
        for edit in edits:
            question = edit.example.question
            missing = [name for name in question.target_names if (question.key, name) not in originals]
            picture = edit.example.image.resize(edit.image.size, Resampling.LANCZOS) if missing else None  # resolution must not decide
            originals |= {(question.key, name): counting(question, name, picture) for name in missing}
        edited = [counting(e.example.question, name, e.image) for e in edits for name in e.example.question.target_names]
        asked = [replace(edit.example, image=edit.image, source="judge") for edit in edits] if self.answers else []
        told = self._ask([*asked, *originals.values(), *edited])
        right = [answer.correct for answer in told[: len(asked)]] or [True] * len(edits)
        before = dict(zip(originals, (answer.parsed for answer in told[len(asked) :])))
        after = iter(answer.parsed for answer in told[len(asked) + len(originals) :])
        keys = [[(edit.example.question.key, name) for name in edit.example.question.target_names] for edit in edits]
        alike = [all([before[key] == next(after) for key in row]) for row in keys]
        return [float(a and r) for a, r in zip(alike, right)]

    def _ask(self, examples: Sequence[Example]) -> list[Answer]:
        answers = self.answerer(examples, 1, 0.0, [seed_of("judge", example.question.id) for example in examples])
        return [trials[0] for trials in answers]

    def _warn(self, missing: int) -> None:
        if missing and not self.unjudged:
            warnings.warn("questions without target_names pass the uniqueness judge unjudged (reward.judge; said once)", stacklevel=3)
        self.unjudged += missing


def counting(question: Question, name: str, image: Image) -> Example:
    """ "How many NAME are there?" about a picture, as multiple choice."""
    asked = Question(f"{question.id}/count/{name}", question.image, f"How many {name} are there?", "B", COUNTS, kind="judge")
    return Example(asked, image, source="judge")
