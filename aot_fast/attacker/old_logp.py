"""Several optimizer steps on one rollout, and the trainer's own log-probs as the ratio's old ones (attacker.old_logp recompute).

A rollout denoises in other batches than an update replays, so the two round otherwise. Log-probs formed by the trainer itself, at the
sampling weights and in the very micro-batches of the update, keep that out of the ratio; what was recorded is then only compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from aot_fast.attacker.flow_grpo import ScoredGroup
from aot_fast.attacker.model import Attacker
from aot_fast.attacker.replay import Item, replay, replay_batches


def by_step(attacker: Attacker, scored: Sequence[ScoredGroup], num_steps: int) -> list[list[ScoredGroup]]:
    """This rank's groups of a rollout by the optimizer step that trains on them, `prompts_per_step` groups of all ranks each."""
    runtime, size = attacker.runtime, attacker.config.prompts_per_step
    parts: list[list[ScoredGroup]] = [[] for _ in range(num_steps)]
    for place, group in zip(runtime.mine(size * num_steps), scored):
        parts[place // size].append(group)
    return parts


def anchored(attacker: Attacker, parts: list[list[ScoredGroup]]) -> list[list[ScoredGroup]]:
    """`parts` (by_step) with the trainer's log-probs beside the rollout's. A collective.

    The first part needs none: where the weights have not moved, old = stopgrad(new). The rollout's, too, where the config asks for those.
    """
    if attacker.config.old_logp == "rollout" or len(parts) == 1:
        return parts
    return parts[:1] + [_recorded(attacker, part) for part in parts[1:]]


def _recorded(attacker: Attacker, part: Sequence[ScoredGroup]) -> list[ScoredGroup]:
    zero = torch.zeros((), device=attacker.runtime.device)
    items = [Item(one.group.encoding, step, zero) for one in part for sample in one.group.samples for step in sample.steps]
    made = {}
    with attacker.replaying(), torch.no_grad():
        for batch in replay_batches(attacker, items):
            now = replay(attacker, batch)
            velocities = [None] * len(batch) if now.velocity is None else now.velocity
            for item, logp, velocity in zip(batch, now.logp, velocities):
                made[id(item.step)] = replace(item.step, trainer_logp=logp, velocity=velocity)
    samples = [[replace(s, steps=tuple(made[id(step)] for step in s.steps)) for s in one.group.samples] for one in part]
    return [replace(one, group=replace(one.group, samples=tuple(own))) for one, own in zip(part, samples)]
