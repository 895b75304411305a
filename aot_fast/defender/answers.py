"""What the others see of a Defender: a function from pictures to judged answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aot_fast.data.answers import score
from aot_fast.data.schema import Answer, Example
from aot_fast.defender.model import Defender
from aot_fast.defender.rollout import Sampling, sample

Answerer = Callable[[Sequence[Example], int, float, Sequence[int]], list[list[Answer]]]


def answerer(defender: Defender) -> Answerer:
    """`answer(examples, trials, temperature, seeds)` -> `trials` answers to each example (temperature 0: greedy).

    Must be called inside `defender.whole()`; no collectives, so ranks may bring different numbers of examples, even none.
    """

    def answer(examples: Sequence[Example], trials: int, temperature: float, seeds: Sequence[int]) -> list[list[Answer]]:
        sampling = Sampling(trials, temperature, defender.config.top_p, defender.config.max_response_tokens)
        groups = sample(defender, examples, seeds, sampling)
        return [[score(example.question, r.text) for r in responses] for example, responses in zip(examples, groups)]

    return answer
