"""The Defender's rewards. A reward is (value, correct): groups are kept by `correct`, advantages come from `value`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from importlib import import_module

from aot_fast.config import DefenderConfig
from aot_fast.data.answers import score
from aot_fast.data.schema import Question

Reward = Callable[[str, Question], tuple[float, bool]]
EXACT_BOX = re.compile(r"\\boxed\{([A-Z])\}")


def aot(text: str, question: Question) -> tuple[float, bool]:
    """AOT's reward: 0.8 for the right answer, 0.2 more when it also stands in an exact `\\boxed{LETTER}`; wrong or unparseable is 0."""
    correct = score(question, text).correct
    boxed = EXACT_BOX.findall(text) if question.options else re.findall(r"\\boxed\{[^{}]+\}", text)
    return (0.8 + 0.2 * bool(boxed)) * correct, correct


def exact(text: str, question: Question) -> tuple[float, bool]:
    """1 for the right answer, else 0."""
    correct = score(question, text).correct
    return float(correct), correct


REWARDS: dict[str, Reward] = {"aot": aot, "exact": exact}


def find_reward(name: str) -> Reward:
    """A reward by name or as `module:function`, a plug-in named by the configuration only. Raises ValueError."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"defender.reward: {name!r} is none of {sorted(REWARDS)} and no module:function")
    return getattr(import_module(module), function)


def guarded(reward: Reward, text: str, question: Question) -> tuple[float, bool]:
    """`reward`, with NaN for whatever is no finite number: one bad sample must not cost its group (MATH.md section 1)."""
    try:
        value, correct = reward(text, question)
        return (float(value) if value is not None and math.isfinite(value) else math.nan), bool(correct)
    except Exception as error:  # a plug-in's error is counted with the non-finite rewards, and said
        print(f"defender.reward failed on question {question.id!r}: {type(error).__name__}: {error}", flush=True)
        return math.nan, False


def overlong_penalty(length: int, config: DefenderConfig) -> float:
    """Soft punishment in [-1, 0] of a response of `length` tokens (DAPO; MATH.md section 2)."""
    if not config.overlong_buffer:
        return 0.0
    free = config.max_response_tokens - config.overlong_buffer
    return max(-1.0, min(0.0, (free - length) / config.overlong_buffer))
