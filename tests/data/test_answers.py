"""Promises of answer parsing: the order of the rules."""

import pytest

from aot_fast.data.answers import parse_answer, score
from aot_fast.data.schema import Question

OPTIONS = ("red", "dark red", "left of the mug", "no")

PARSED = {
    # \boxed{} first, the last one wins
    r"\boxed{B}": "B",
    r"First \boxed{A}, then \boxed{C}.": "C",
    r"Answer: A. So \boxed{B}": "B",
    r"\boxed{\text{D}}": "D",
    r"\boxed{(b)}": "B",
    r"\boxed{C.}": "C",
    r"\boxed{A: red}": "A",
    r"\boxed{dark red}": "B",
    r"\boxed{\text{dark red}}": "B",
    r"\boxed{A or B}": "",
    r"\boxed{Z} Answer: A": "",
    r"Answer: A \boxed{}": "A",
    r"Answer: A \boxed{B": "A",
    # then "Answer: X"
    "I see a mug. Answer: B": "B",
    "The answer is (C).": "C",
    "**Answer:** D": "D",
    "Answer: A\nAnswer: B": "B",
    "The correct answer is: dark red, B or not": "B",
    "Answer: no": "D",
    # then a leading letter
    "B": "B",
    "B. dark red": "B",
    "(C) because it is there": "C",
    "A\nsince the mug": "A",
    "D) no": "D",
    "B since it is darker": "B",
    # then the option's text; words that happen to be letters are none
    "A dark red thing": "B",
    "I think it is red": "A",
    "It stands left of the mug.": "C",
    "It is red, no doubt": "",
    "redder than ever": "",
    "E": "",
    "": "",
}


@pytest.mark.parametrize("text, letter", PARSED.items())
def test_the_chosen_letter_is_found(text, letter):
    assert parse_answer(text, OPTIONS) == letter


@pytest.mark.parametrize(
    "text, right",
    [(r"It is \boxed{ The Red  Mug. }", True), ("Answer: red mug", True), ("RED MUG", True), (r"\boxed{mug}", False), ("", False)],
)
def test_open_answers_match_by_their_words(text, right):
    assert score(Question(id="q", image="i", question="?", answer="a red mug"), text).correct is right


def test_a_score_keeps_text_and_parsed_answer():
    answer = score(Question(id="q", image="i", question="?", answer="B", options=OPTIONS), r"so \boxed{B}")
    assert (answer.text, answer.parsed, answer.correct) == (r"so \boxed{B}", "B", True)
