"""Score recorded steps again under the weights being trained: the log-probs whose gradient is the Flow-GRPO update.

The plain path: every (sample, step) is an item, micro-batches hold items of equal shape, and all ranks run equally many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import aot_fast.kernels as K
from aot_fast.attacker.batching import batches, num_pairs
from aot_fast.attacker.encoding import Encoding, blank_encoding
from aot_fast.attacker.model import Attacker
from aot_fast.attacker.sampler import TrainedStep, guided
from aot_fast.attacker.velocity import velocity
from aot_fast.config import AttackerConfig
from aot_fast.engine import adapter_off, microbatches

DRIFTING = ("guard", "dppo")
"""Variants of the loss that ask how far the mean has moved since the rollout."""


@dataclass(frozen=True)
class Item:
    """One trained step of one sample."""

    encoding: Encoding
    step: TrainedStep
    advantage: Tensor
    """0-d fp32."""
    fresh: bool = True
    """Whether the weights have not moved since the rollout."""
    weight: bool = True
    """False: stands in for a missing item; runs forward and backward and counts nothing."""


class Replayed(NamedTuple):
    """[B] each; logp, kl and drift carry gradients."""

    logp: Tensor
    old_logp: Tensor
    """Of the ratio: as recorded, or the trainer's own (config.old_logp)."""
    mismatch: Tensor
    """|trainer's - rollout's log-prob| under the same weights; 0 where the trainer has none under those."""
    advantages: Tensor
    mask: Tensor
    """bool; False: a blank item."""
    kl: Tensor | None
    """To the model without its adapter; None when beta is 0."""
    drift: Tensor | None
    """Of the mean from the rollout's, squared; None unless the variant needs it."""
    std: Tensor
    dt: Tensor
    velocity: Tensor | None
    """[B, N, 4c] guided, without gradient; None unless the variant needs it."""


def replay_batches(attacker: Attacker, items: Sequence[Item]) -> list[list[Item]]:
    """Micro-batches of items of equal shape (batching.num_pairs of them), equally many on every rank (padded with blank items)."""
    size = partial(_size, attacker.config)
    own = batches(items, size, lambda item: (tuple(item.encoding.shapes), item.step.velocity is None))
    padded = microbatches(attacker.runtime, own, 1)
    return [batch[0] if batch else [blank_item(attacker)] for batch in padded]


def _size(config: AttackerConfig, items: Sequence[Item]) -> int:
    return num_pairs(config, [item.encoding for item in items])


def blank_item(attacker: Attacker) -> Item:
    """A step of the blank encoding, of weight zero."""
    encoding = blank_encoding(attacker)
    tokens = encoding.reference
    zero = torch.zeros((), device=attacker.runtime.device)
    step = TrainedStep(tokens, tokens, 0.5, 0.25, 0.75, zero, tokens if attacker.config.variant in DRIFTING else None)
    return Item(encoding, step, zero, weight=False)


def replay(attacker: Attacker, items: Sequence[Item]) -> Replayed:
    """Log-probs of the recorded steps of one micro-batch under the training engine. A collective."""
    config, device = attacker.config, attacker.runtime.device
    steps, encodings = [item.step for item in items], [item.encoding for item in items]
    fresh, mask = (torch.tensor([getattr(item, name) for item in items], device=device) for name in ("fresh", "weight"))
    x, x_next = (torch.stack([getattr(step, name) for step in steps]) for name in ("x", "x_next"))
    levels = [step.sigma for step in steps]
    # On the host: the coefficients then go to the device in one copy, where they would be thirty launches on [B] numbers each.
    sigma, sigma_next, sigma_max = torch.tensor([[s.sigma, s.sigma_next, s.sigma_max] for s in steps], dtype=torch.float64).T
    reference = None
    if config.beta > 0:
        with torch.no_grad(), adapter_off(attacker.player.module):
            reference = guided(velocity(attacker.player, encodings, x, levels, config.guidance > 1), config)
    now = velocity(attacker.player, encodings, x, levels, config.guidance > 1)
    v_new = guided(now, config).detach() if config.variant in DRIFTING else None
    scored = K.flow_logp(
        x,
        now.v,
        x_next,
        sigma,
        sigma_next,
        dynamics=config.dynamics,
        eta=config.eta,
        sigma_max=sigma_max,
        v_ref=reference,
        v_old=None if v_new is None else _old_velocity(config, steps, v_new, fresh),
        kl=config.kl,
        v_uncond=now.v_uncond,
        guidance=config.guidance,
        cps_logp=config.cps_logp,
    )
    std = K.flow_coefficients(sigma, sigma_next, dynamics=config.dynamics, eta=config.eta, sigma_max=sigma_max, batch=len(items)).std
    old, gap = _old_logp(config, steps, scored.logp.detach(), fresh)
    return Replayed(
        logp=scored.logp,
        old_logp=old,
        mismatch=torch.where(mask, gap, 0.0),
        advantages=torch.stack([item.advantage for item in items]),
        mask=mask,
        kl=scored.kl,
        drift=scored.drift,
        std=std.to(device),
        dt=(sigma_next - sigma).to(device),
        velocity=v_new,
    )


def _old_logp(config: AttackerConfig, steps: Sequence[TrainedStep], logp: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """[B] old log-probs of the ratio; and |trainer's own under the sampling weights - the rollout's|, 0 where there are none such."""
    recorded = torch.stack([step.logp for step in steps])
    own = torch.stack([step.logp if step.trainer_logp is None else step.trainer_logp for step in steps])
    own = torch.where(fresh, logp, own)
    return own if config.old_logp == "recompute" else recorded, (own - recorded).abs()


def _old_velocity(config: AttackerConfig, steps: Sequence[TrainedStep], v_new: Tensor, fresh: Tensor) -> Tensor:
    """[B, N, 4c] of the sampling weights, for the drift since."""
    recorded = torch.stack([step.velocity for step in steps])
    return torch.where(fresh[:, None, None], v_new, recorded) if config.old_logp == "recompute" else recorded
