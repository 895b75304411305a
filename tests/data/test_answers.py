"""Promises of answer parsing (the order of the rules) and of the statistics."""

import math

import pytest

from aot_fast.data.answers import parse_answer, score
from aot_fast.data.schema import Question
from aot_fast.evaluation.statistics import Share, paired_difference, wilson

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


@pytest.mark.parametrize(
    "successes, n, low, high",
    [(8, 10, 0.490162, 0.943318), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (50, 100, 0.403832, 0.596168), (1, 1, 0.206549, 1.0)],
)
def test_wilson_against_the_values_of_scipy(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-6)


def test_nothing_is_known_of_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    assert Share(0, 0).value is None


def test_paired_difference_uses_common_questions_and_is_reproducible():
    old = {f"{i}": i % 2 == 0 for i in range(200)}
    new = {f"{i}": i % 2 == 0 or i % 10 == 1 for i in range(210)}
    found = paired_difference(new, old)
    assert (found.value, found.n) == (pytest.approx(0.1), 200)
    # A mean of 200 draws of {0, 1} with p = 0.1 has standard deviation 0.0212.
    assert found.low == pytest.approx(0.1 - 1.96 * 0.0212, abs=0.006)
    assert found.high == pytest.approx(0.1 + 1.96 * 0.0212, abs=0.006)
    assert found == paired_difference(dict(reversed(new.items())), old)


def test_pairing_makes_the_interval_narrower_than_that_of_two_samples():
    old = {f"{i}": i % 2 == 0 for i in range(100)}
    found = paired_difference(old, old)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_no_common_question_says_nothing():
    found = paired_difference({"a": True}, {"b": True})
    assert found.value is None and math.isclose(found.high - found.low, 2)
