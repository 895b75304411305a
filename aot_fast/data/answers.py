"""From a generated text to an answer, and whether it is right.

A letter is looked for in `\\boxed{}`, after "Answer:", at the start, and as the text of an option, in that order; the first rule that
finds something decides.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from aot_fast.data.schema import LETTERS, Answer, Question

AFTER_ANSWER = re.compile(r"answer(?:\s+is)?\s*:|answer\s+is\b", re.IGNORECASE)
# "A red mug" and "I think" begin with a word, not with a letter that was chosen; after other letters a space is enough.
LEADING_LETTER = re.compile(r"[\s*(\[]*(?:(?P<word>[AI])(?=[.):,\]*\n]|\s*$)|(?P<letter>[B-HJ-Z])(?=[.):,\]*\s]|$))")
CHOSEN_LETTER = re.compile(r"\(?(?P<letter>[A-Za-z])\)?[.:]?")


def _boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}`, braces inside it balanced; None if there is none or it is empty."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            content = re.sub(r"\\text\w*\{([^{}]*)\}", r"\1", text[begin:position]).strip(" $\n\t")
            return content or None
    return None


def _after_answer(text: str) -> str | None:
    """The rest of the line after the last "Answer:" or "answer is"."""
    matches = list(AFTER_ANSWER.finditer(text))
    return (text[matches[-1].end() :].strip(" *\n").split("\n")[0].split("\\boxed")[0].strip() or None) if matches else None


def _letter(found: str | None, num_options: int) -> str:
    return found.upper() if found and found.upper() in LETTERS[:num_options] else ""


def _leading_letter(text: str, num_options: int) -> str:
    match = LEADING_LETTER.match(text)
    return _letter(match and (match["word"] or match["letter"]), num_options)


def _option_in(text: str, options: Sequence[str]) -> str:
    """Letter of the only option whose text stands in `text` as whole words; "dark red" does not count as "red" too."""
    rest, found = text.casefold(), []
    for option in sorted(options, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(option.casefold().strip())}(?!\w)"
        if re.search(pattern, rest):
            found.append(LETTERS[options.index(option)])
            rest = re.sub(pattern, " ", rest)
    return found[0] if len(found) == 1 else ""


def _choice(text: str, options: Sequence[str]) -> str:
    """The option that a short text names, by its letter or its text."""
    chosen = CHOSEN_LETTER.fullmatch(text)
    return _letter(chosen and chosen["letter"], len(options)) or _leading_letter(text, len(options)) or _option_in(text, options)


def parse_answer(text: str, options: Sequence[str] = ()) -> str:
    """The letter chosen in `text` ("" if none or more than one is), or without options the words of the answer."""
    boxed, after = _boxed(text), _after_answer(text)
    if not options:
        return boxed or after or text.strip()
    if boxed:
        return _choice(boxed, options)
    return (after and _choice(after, options)) or _leading_letter(text, len(options)) or _option_in(text, options)


def normalise(text: str) -> str:
    """An open answer without what does not change it: case, width, articles, surrounding punctuation, repeated spaces."""
    words = re.sub(r"\b(?:a|an|the)\b", " ", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(words.split()).strip(" .,;:!?\"'")


def is_correct(parsed: str, question: Question) -> bool:
    """Whether a parsed answer is the question's: the same letter, or for an open question the same words."""
    if question.options:
        return parsed == question.answer
    return normalise(parsed) == normalise(question.answer)


def score(question: Question, text: str) -> Answer:
    """The answer in `text` and whether it is right."""
    parsed = parse_answer(text, question.options)
    return Answer(text=text, parsed=parsed, correct=is_correct(parsed, question))
