"""What the others see of a Defender: a function from pictures to judged answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

import aot_fast.kernels as K
from aot_fast.data.answers import score
from aot_fast.data.schema import Answer, Example
from aot_fast.defender.drawing import Sampling
from aot_fast.defender.head import rollout_logits
from aot_fast.defender.model import Defender
from aot_fast.defender.packing import Row, batch_of, response_logits
from aot_fast.defender.prompt import Prompt, encode
from aot_fast.defender.rollout import sample

AHEAD = 4
"""Prompts a thread may be ahead of the one that is asked for."""

Answerer = Callable[[Sequence[Example], int, float, Sequence[int]], list[list[Answer]]]
Likelihood = Callable[[Sequence[Example], Sequence[Example]], list[float]]


def answerer(defender: Defender) -> Answerer:
    """`answer(examples, trials, temperature, seeds)` -> `trials` answers to each example (temperature 0: greedy).

    Must be called inside `defender.whole()`; no collectives, so ranks may bring different numbers of examples, even none.
    """

    def answer(examples: Sequence[Example], trials: int, temperature: float, seeds: Sequence[int]) -> list[list[Answer]]:
        sampling = Sampling(trials, temperature, defender.config.top_p, defender.config.max_response_tokens)
        groups = sample(defender, encoded(defender, examples), seeds, sampling)
        return [[score(example.question, r.text) for r in responses] for example, responses in zip(examples, groups)]

    return answer


def likelihood(defender: Defender) -> Likelihood:
    """`p(originals, edited)` -> for each pair the probability in [0, 1] that the Defender repeats, on the edited picture, its greedy answer
    to the original: the exact mean, over all answers it could sample at temperature 1, of what a trial finds out by chance.

    Meant for short answers: the probability of a long one is near 0 whatever the picture. Must be called inside `defender.whole()`.
    """

    def probability(originals: Sequence[Example], edited: Sequence[Example]) -> list[float]:
        asked = {example.key: example for example in originals}
        greedy = Sampling(1, 0.0, 1.0, defender.config.max_response_tokens)
        prompts = encoded(defender, list(asked.values()))
        answers = dict(zip(asked, (group[0] for group in sample(defender, prompts, [0] * len(asked), greedy))))
        rows: list[Row] = []
        told: list[float] = []
        for original, prompt in zip(originals, encoded(defender, edited), strict=True):
            answer = answers[original.key]
            rows.append(Row(prompt, answer.ids, answer.logp, torch.zeros_like(answer.logp), len(rows)))
            if _is_full(defender, rows):
                told += _probabilities(defender, rows)
                rows = []
        return told + (_probabilities(defender, rows) if rows else [])

    return probability


def encoded(defender: Defender, examples: Sequence[Example]) -> Iterator[Prompt]:
    """The examples' prompts, in order: cut up by `prefetch_workers` threads, a few ahead, while the device is at work on those before."""
    workers = defender.config.prefetch_workers
    if not workers:
        yield from (encode(defender, example) for example in examples)
        return
    ahead: deque[Future[Prompt]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for example in examples:
            ahead.append(pool.submit(encode, defender, example))
            if len(ahead) > AHEAD * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _is_full(defender: Defender, rows: Sequence[Row]) -> bool:
    tokens = sum(len(row.prompt.ids) + len(row.ids) for row in rows)
    return len(rows) >= defender.config.rollout_batch or tokens >= defender.config.tokens_per_microbatch


def _probabilities(defender: Defender, rows: Sequence[Row]) -> list[float]:
    batch = batch_of(defender, rows)
    with rollout_logits(defender):
        logp = K.logprob(response_logits(defender.core, batch), batch.targets).logp
    total = logp.new_zeros(len(rows)).index_add(0, batch.rows, torch.where(batch.mask, logp, 0.0))
    return total.exp().tolist()
