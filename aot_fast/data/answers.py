"""Taking the answer out of a response, and comparing it with the truth (order of BENCHMARKS.md)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from aot_fast.data.schema import LETTERS, Question

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
SAID = re.compile(r"answer\s*(?:is)?\s*:?\s*\(?([A-Z])\b", re.IGNORECASE)
LEADING = re.compile(r"^\(?([A-Z])(?:[).:,]|\s|$)")


def normalise(text: str) -> str:
    """Lower case, single spaces, no closing punctuation: how open answers are compared."""
    return " ".join(text.lower().split()).strip(" .,;:!\"'")


def parse_answer(text: str, options: Sequence[str] = ()) -> str:
    """The letter chosen (with options) or the answer's text; empty if there is none.

    Tried in this order: the last `\\boxed{}`, "Answer: X", a leading letter, the text of exactly one option.
    """
    boxed = BOXED.findall(text)
    if not options:
        return normalise(boxed[-1] if boxed else text)
    letters = LETTERS[: len(options)]
    found = boxed[-1].strip().strip("().").upper() if boxed else ""
    if found in letters and len(found) == 1:
        return found
    if boxed:
        return _option_named(boxed[-1], options)
    for pattern in (SAID, LEADING):
        match = pattern.search(text.strip())
        if match and match[1].upper() in letters:
            return match[1].upper()
    return _option_named(text, options)


def _option_named(text: str, options: Sequence[str]) -> str:
    named = [i for i, option in enumerate(options) if re.search(rf"\b{re.escape(normalise(option))}\b", normalise(text))]
    return LETTERS[named[0]] if len(named) == 1 else ""


def is_correct(parsed: str, question: Question) -> bool:
    """Whether a parsed answer is the question's."""
    truth = question.answer if question.options else normalise(question.answer)
    return bool(parsed) and parsed == truth
