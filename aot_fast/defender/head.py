"""The Defender's head: from hidden states to log-probs, or straight to the policy loss.

Plain (kernels.backend: reference): the head gives logits [N, V], then logprob and policy_loss. Fused, in every other case: the head's
own forward is linear_policy_loss or linear_logprob, which hold the logits of a chunk of rows at a time. It has to be the head's forward:
only there does ZeRO-3 hold the weight whole, and from there it takes the weight's gradient.
Shapes: N response tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import aot_fast.kernels as K
from aot_fast.defender.model import Defender
from aot_fast.defender.packing import Batch, response_logits
from aot_fast.engine import adapter_off
from aot_fast.kernels.gemm import gemm_operand, product


def batch_loss(defender: Defender, batch: Batch, **options: Any) -> K.PolicyLoss:
    """The policy loss of a micro-batch, at the sampling temperature, as at the rollout. A collective.

    options: what policy_loss and linear_policy_loss both take.
    """
    config, targets, advantages = defender.config, batch.targets, batch.advantages
    if _plain():
        out = K.logprob(response_logits(defender.player, batch), targets, temperature=config.temperature)
        return K.policy_loss(out.logp, advantages, valid=out.valid, entropy=out.entropy, **options)
    metrics = {}

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        given = hidden, weight, targets, advantages
        made = K.linear_policy_loss(*given, temperature=config.temperature, chunk_rows=config.head_chunk_rows, **options)
        metrics.update(made.metrics)
        return made.loss

    return K.PolicyLoss(_through_head(defender, defender.player, batch, loss), metrics)


def reference_logp(defender: Defender, reference: Defender | None, batch: Batch) -> Tensor | None:
    """[N] log-probs of the Defender before training, when the KL is on; else None."""
    if not defender.config.beta:
        return None
    if not defender.config.lora.rank:
        return _logp(reference, reference.model, batch)
    with adapter_off(defender.model):
        return _logp(defender, defender.player, batch)


def trainer_logp(defender: Defender, batch: Batch) -> Tensor:
    """[N] log-probs of the policy as it is, as training forms them. A collective."""
    return _logp(defender, defender.player, batch)


@contextmanager
def rollout_logits(defender: Defender) -> Iterator[None]:
    """Inside, a head in half precision gives fp32 logits, as the fused loss forms them; the plain one takes the rounded ones.

    Rounded to bf16, the rollout's log-probs would differ from the trainer's by up to 0.02 (small Defender, temperature 1.5), and that is
    where the ratio starts from.
    """
    head = defender.core.lm_head
    if _plain() or head.weight.dtype.itemsize > 2 or type(head) is not nn.Linear:
        yield
        return
    matrix = gemm_operand(head.weight)
    head.forward = lambda hidden: product(hidden.flatten(0, -2), matrix.T, torch.float32).unflatten(0, hidden.shape[:-1])
    try:
        yield
    finally:
        del head.forward


def _plain() -> bool:
    return K.backend_in_force() == "reference"


@torch.no_grad()
def _logp(owner: Defender, model: Callable, batch: Batch) -> Tensor:
    config = owner.config
    if _plain():
        return K.logprob(response_logits(model, batch), batch.targets, temperature=config.temperature).logp

    def logp(hidden: Tensor, weight: Tensor) -> Tensor:
        return K.linear_logprob(hidden, weight, batch.targets, temperature=config.temperature, chunk_rows=config.head_chunk_rows).logp

    return _through_head(owner, model, batch, logp)


def _through_head(defender: Defender, model: Callable, batch: Batch, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`compute(hidden [N, H], weight [V, H])` in place of the logits, as the model returns it: what ZeRO-3 does before the head's
    backward pass hangs on that tensor."""
    head = defender.core.lm_head
    if type(head) is not nn.Linear:
        raise ValueError(
            f"defender.lora.targets: lm_head is a {type(head).__module__}.{type(head).__name__}, expected torch's Linear; leave it out, "
            "or set kernels.backend reference"
        )
    head.forward = lambda hidden: compute(hidden.flatten(0, 1), head.weight)
    try:
        return model(**batch.inputs, use_cache=False).logits
    finally:
        del head.forward
