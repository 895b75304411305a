"""DiffusionNFT (Zheng et al., arXiv 2509.16117; MATH.md section 3): the same reward without log-probs, on the forward process.

Flow-GRPO correlates the reward with noise that it injects into every latent; here only what a sample came out as counts, and the pixels
that the reference already decides add no noise to the gradient. Samples are plain ODE samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aot_fast.attacker.batching import batches, num_pairs
from aot_fast.attacker.encoding import Encoding
from aot_fast.attacker.flow_grpo import ScoredGroup, group_advantages, reduced
from aot_fast.attacker.model import Attacker
from aot_fast.attacker.replay import blank_item
from aot_fast.attacker.sampler import Sample, schedule
from aot_fast.attacker.velocity import velocity
from aot_fast.engine import microbatches, seed_of


@dataclass(frozen=True)
class Noised:
    """A sample's latents carried to a noise level."""

    encoding: Encoding
    x: Tensor
    """[N, 4c]"""
    target: Tensor
    """[N, 4c]: noise - latents, the velocity that flow matching asks for here."""
    sigma: float
    optimality: Tensor
    """r in [0, 1], 0-d fp32: 1/2 for a sample as good as its group."""
    weight: bool = True
    """False: stands in for a missing item."""


def update(attacker: Attacker, scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """One optimizer step on this rank's scored groups; returns metrics of all ranks. A collective.

    With v the velocity at a noised sample, v' its value under the weights that drew the sample, u its flow-matching target:
    L = mean over samples and `window` noise levels of r |v - u|^2 + (1 - r) |2 v' - v - u|^2, r = (1 + clip(A / adv_clip, -1, 1)) / 2.
    A good sample draws v to itself, a bad one pushes it away; v is the conditional velocity, also where samples are guided. The weights
    have not moved since the rollout, so v' is v, detached.
    """
    config, player, runtime = attacker.config, attacker.player, attacker.runtime
    advantages, metrics = group_advantages(attacker, scored)
    items = [
        item
        for part, row in zip(scored, advantages)
        for sample, verdict, advantage in zip(part.group.samples, part.verdicts, row)
        for item in noised(attacker, part.group.encoding, sample, advantage, verdict.seed)
    ]
    count = runtime.all_reduce(torch.tensor(float(len(items)), device=runtime.device))
    if not count:
        raise ValueError("no rank has a sample to train on: every question was left out")

    def size(alike: list[Noised]) -> int:
        return num_pairs(config, [item.encoding for item in alike])

    own = microbatches(runtime, batches(items, size, lambda item: tuple(item.encoding.shapes)), 1)
    total, healthy = torch.zeros((), device=runtime.device), torch.ones((), dtype=torch.bool, device=runtime.device)
    with attacker.replaying():
        for batch in own:
            loss = nft_loss(attacker, batch[0] if batch else [_blank(attacker)]) / count
            player.backward(loss)
            healthy &= loss.detach().isfinite()
            total += loss.detach()
    done = player.step(healthy)
    if done.applied and attacker.ema:
        attacker.ema.update()
    metrics |= {"loss": reduced(runtime, {"sum/loss": total})["sum/loss"], "samples": count.item()}
    return metrics | {"grad_norm": done.grad_norm, "lr": done.lr, "applied": float(done.applied)}


def noised(attacker: Attacker, encoding: Encoding, sample: Sample, advantage: Tensor, seed: int) -> list[Noised]:
    """`config.window` different noise levels of the schedule's steps in `config.window_range`, drawn by the sample's seed."""
    config, latents = attacker.config, sample.latents.float()
    sigmas = schedule(attacker, len(latents))
    chance = torch.Generator().manual_seed(seed_of(seed, "nft"))
    low, high = config.window_range
    optimality = (1 + (advantage / config.adv_clip).clamp(-1, 1)) / 2
    items = []
    for k in (low + torch.randperm(high - low, generator=chance)[: config.window]).tolist():
        noise = torch.randn(latents.shape, generator=chance).to(latents.device)
        x = torch.lerp(latents, noise, sigmas[k]).to(attacker.runtime.dtype)
        items.append(Noised(encoding, x, noise - latents, sigmas[k], optimality))
    return items


def nft_loss(attacker: Attacker, items: Sequence[Noised]) -> Tensor:
    """Sum over the items of one micro-batch, fp32."""
    x, target = (torch.stack([getattr(item, name) for item in items]) for name in ("x", "target"))
    v = velocity(attacker.player, [item.encoding for item in items], x, [item.sigma for item in items], False).v.float()
    r = torch.stack([item.optimality for item in items])
    toward, away = ((branch - target).square().mean((1, 2)) for branch in (v, 2 * v.detach() - v))
    weight = torch.tensor([item.weight for item in items], device=v.device)
    return torch.where(weight, r * toward + (1 - r) * away, 0.0).sum()


def _blank(attacker: Attacker) -> Noised:
    item = blank_item(attacker)
    return Noised(item.encoding, item.step.x, item.step.x, item.step.sigma, item.advantage, weight=False)
