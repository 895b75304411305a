import pytest

from aot_fast.config import DefenderConfig
from aot_fast.data.schema import Question
from aot_fast.defender.reward import aot, exact, find_reward, overlong_penalty

CHOICE = Question("q", "i.png", "Which colour?", "B", ("red", "blue"))
OPEN = Question("q", "i.png", "How many?", "two")


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("\\boxed{B}", 1.0),
        ("blue \\boxed{B}", 1.0),
        ("\\boxed{b}", 0.8),  # right, but not the exact form
        ("Answer: B", 0.8),
        ("blue", 0.8),
        ("\\boxed{A}", 0.0),
        ("\\boxed{A} no, \\boxed{B}", 1.0),
        ("red or blue", 0.0),
        ("", 0.0),
    ],
)
def test_aot_reward(text, reward):
    assert aot(text, CHOICE) == (reward, reward > 0)


def test_open_answers_are_compared_as_text():
    assert exact("\\boxed{Two.}", OPEN) == (1.0, True) and exact("three", OPEN) == (0.0, False)


def test_plug_in_is_found_and_a_wrong_name_refused():
    assert find_reward("aot_fast.defender.reward:exact") is exact
    with pytest.raises(ValueError, match="aot"):
        find_reward("best")


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (120, -1.0)])
def test_overlong_penalty_is_a_ramp(length, penalty):
    assert overlong_penalty(length, DefenderConfig(max_response_tokens=100, overlong_buffer=20)) == pytest.approx(penalty)
    assert overlong_penalty(length, DefenderConfig(max_response_tokens=100)) == 0
