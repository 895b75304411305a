"""The trainer's own log-probs of what was sampled, formed while the policy is still the one that sampled (defender.old_logp recompute)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aot_fast.defender.groups import Group, Stream
from aot_fast.defender.head import trainer_logp
from aot_fast.defender.model import Defender
from aot_fast.defender.packing import batch_of
from aot_fast.defender.prompts import Prompts
from aot_fast.defender.shares import rows_of, share_of


def with_old_logp(defender: Defender, prompts: Prompts, groups: list[Group], stream: Stream) -> list[Group]:
    """`groups`, which every rank holds, with the trainer's log-probs beside the sampler's; those banked in `stream` get theirs in place.

    Groups of an earlier policy keep what they have, and groups that are trained on at once and without `importance_cap` need none: where
    the policy has not moved, old = stopgrad(new). A collective.
    """
    config = defender.config
    if config.old_logp == "rollout":
        return groups
    read = groups if config.steps_per_rollout > 1 or config.importance_cap else []
    recorded = _recorded(defender, prompts, [*read, *stream.bank])
    stream.bank = recorded[len(read) :]
    return recorded[: len(read)] or groups


def _recorded(defender: Defender, prompts: Prompts, groups: Sequence[Group]) -> list[Group]:
    wanted = [g.version == defender.version and r.old_logp is None for g in groups for r in g.responses]
    if not any(wanted):
        return list(groups)
    made: dict[int, Tensor] = {}
    with defender.updating():
        for parts in share_of(defender, groups, wanted):
            rows = rows_of(defender, prompts, groups, parts, torch.zeros(len(wanted)))
            batch = batch_of(defender, rows)
            logp = trainer_logp(defender, batch).float()[batch.mask].cpu()
            live = [row for row in rows if row.weight]
            made |= {row.sequence: part.clone() for row, part in zip(live, logp.split([len(row.ids) for row in live]))}
    for other in defender.runtime.gather(made):
        made |= other
    numbers = iter(range(len(wanted)))
    return [
        replace(group, responses=tuple(replace(r, old_logp=made.get(n, r.old_logp)) for r, n in zip(group.responses, numbers)))
        for group in groups
    ]
