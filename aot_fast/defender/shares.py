"""Who trains which responses: the rows of an optimizer step split over ranks and micro-batches.

Shared prompts: whole groups go to ranks by their tokens and fill micro-batches up to a budget. Padded: every world-th response,
`microbatch` at a time. Every rank knows all groups, so that the split needs no message; only the number of micro-batches is agreed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from aot_fast.defender.drawing import Response
from aot_fast.defender.groups import Group
from aot_fast.defender.model import Defender
from aot_fast.defender.packing import Row
from aot_fast.defender.prompt import blank_prompt
from aot_fast.defender.prompts import Prompts
from aot_fast.engine import evened


@dataclass(frozen=True)
class Part:
    """Responses of one group that stay together."""

    group: int
    prompt_tokens: int
    responses: tuple[int, ...]
    """Their numbers in the optimizer step."""
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + sum(self.lengths)

    def halves(self) -> tuple[Part, Part]:
        middle = len(self.responses) // 2
        return self.cut(0, middle), self.cut(middle, len(self.responses))

    def cut(self, start: int, stop: int) -> Part:
        return Part(self.group, self.prompt_tokens, self.responses[start:stop], self.lengths[start:stop])


def share_of(defender: Defender, groups: Sequence[Group], wanted: Sequence[bool]) -> list[list[Part]]:
    """This rank's micro-batches, as many as every other rank has and at least one; empty where this rank has none left. A collective.

    wanted: of each response of the step whether it is trained on.
    """
    config, runtime = defender.config, defender.runtime
    first = [0, *accumulate(len(g.responses) for g in groups)]
    parts = []
    for number, (group, start) in enumerate(zip(groups, first)):
        own = [j for j in range(len(group.responses)) if wanted[start + j]]
        lengths = tuple(len(group.responses[j].ids) for j in own)
        parts.append(Part(number, group.prompt_tokens, tuple(start + j for j in own), lengths))
    parts = [part for part in parts if part.responses]
    if not config.shared_prefix:
        mine = [part.cut(j, j + 1) for part in parts for j in range(len(part.responses))][runtime.rank :: runtime.world]
        own_batches = [mine[i : i + config.microbatch] for i in range(0, len(mine), config.microbatch)]
    else:
        own_batches = filled(balanced(parts, runtime.world)[runtime.rank], config.tokens_per_microbatch)
    return evened(runtime, own_batches or [[]])


def balanced(parts: Sequence[Part], num_ranks: int) -> list[list[Part]]:
    """The parts of each rank, in their order: the largest first to the rank with the fewest tokens.

    Where there are fewer parts than ranks the largest are halved: a prompt is then computed on two ranks.
    """
    whole = list(parts)
    while len(whole) < num_ranks and any(len(part.responses) > 1 for part in whole):
        largest = max((part for part in whole if len(part.responses) > 1), key=lambda part: part.tokens)
        whole.remove(largest)
        whole += largest.halves()
    ranks: list[list[Part]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for part in sorted(whole, key=lambda part: (-part.tokens, part.responses)):
        rank = loads.index(min(loads))
        ranks[rank].append(part)
        loads[rank] += part.tokens
    return [sorted(rank, key=lambda part: part.responses) for rank in ranks]


def filled(parts: Sequence[Part], budget: int) -> list[list[Part]]:
    """Micro-batches of at most `budget` tokens each, but of at least one response."""
    batches: list[list[Part]] = []
    room = 0
    for part in parts:
        start = 0
        while start < len(part.responses):
            stop, cost = start, part.prompt_tokens
            while stop < len(part.responses) and cost + part.lengths[stop] <= room:
                cost += part.lengths[stop]
                stop += 1
            if stop == start:  # not even one response fits
                if batches and room == budget:
                    stop, cost = start + 1, part.prompt_tokens + part.lengths[start]
                else:
                    batches.append([])
                    room = budget
                    continue
            batches[-1].append(part.cut(start, stop))
            room, start = room - cost, stop
    return batches


def rows_of(defender: Defender, prompts: Prompts, groups: Sequence[Group], parts: Sequence[Part], advantages: Tensor) -> list[Row]:
    """The rows of a micro-batch; for an empty one a row of weight 0, whose forward and backward keep ZeRO-3 in step (DESIGN.md rule 5).

    advantages: [responses of the step], on the host.
    """
    if not parts:
        response = groups[0].responses[0]
        return [Row(blank_prompt(defender), response.ids[:1], response.logp[:1], torch.zeros(1), 0, weight=0.0)]
    responses = [r for g in groups for r in g.responses]
    rows = []
    for part in parts:
        prompt = prompts[groups[part.group].example]
        for number in part.responses:
            r, group = responses[number], groups[part.group]
            # Where the policy has not moved, what was recorded while sampling is only compared with: it must be the sampler's.
            old = r.logp if r.old_logp is None or group.version == defender.version else r.old_logp
            rows.append(Row(prompt, r.ids, old, float(advantages[number]) * correction(defender, r), number))
    return rows


def correction(defender: Defender, response: Response) -> Tensor:
    """[R] weight of each token for the distance between trainer and sampler at the policy that sampled it, truncated from above."""
    if not defender.config.importance_cap or response.old_logp is None:
        return torch.ones_like(response.logp)
    return torch.exp(response.old_logp - response.logp).clamp_max(defender.config.importance_cap)
