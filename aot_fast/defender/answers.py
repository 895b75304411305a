"""What the others see of a Defender: a function from pictures to judged answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import aot_fast.kernels as K
from aot_fast.data.answers import score
from aot_fast.data.schema import Answer, Example
from aot_fast.defender.head import rollout_logits
from aot_fast.defender.model import Defender
from aot_fast.defender.packing import Row, collate, response_logits
from aot_fast.defender.prompt import encode
from aot_fast.defender.rollout import Response, Sampling, sample

Answerer = Callable[[Sequence[Example], int, float, Sequence[int]], list[list[Answer]]]
Likelihood = Callable[[Sequence[Example], Sequence[Example]], list[float]]


def answerer(defender: Defender) -> Answerer:
    """`answer(examples, trials, temperature, seeds)` -> `trials` answers to each example (temperature 0: greedy).

    Must be called inside `defender.whole()`; no collectives, so ranks may bring different numbers of examples, even none.
    """

    def answer(examples: Sequence[Example], trials: int, temperature: float, seeds: Sequence[int]) -> list[list[Answer]]:
        sampling = Sampling(trials, temperature, defender.config.top_p, defender.config.max_response_tokens)
        groups = sample(defender, examples, seeds, sampling)
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
        answers = dict(zip(asked, (group[0] for group in sample(defender, list(asked.values()), [0] * len(asked), greedy))))
        pairs = [(example, answers[original.key]) for original, example in zip(originals, edited, strict=True)]
        size = defender.config.rollout_batch
        return [p for i in range(0, len(pairs), size) for p in _probabilities(defender, pairs[i : i + size])]

    return probability


def _probabilities(defender: Defender, pairs: Sequence[tuple[Example, Response]]) -> list[float]:
    rows = [Row(encode(defender, example), answer.ids, answer.logp, 0.0, i) for i, (example, answer) in enumerate(pairs)]
    batch = collate(rows, defender.tokenizer.pad_token_id, defender.core.config.image_token_id, defender.runtime.device)
    with rollout_logits(defender):
        logits = response_logits(defender.core, batch)
    logp = K.logprob(logits.flatten(0, 1), batch.targets.flatten()).logp.view(batch.targets.shape)
    return torch.where(batch.mask, logp, 0.0).sum(-1).exp().tolist()
