"""Sampling answers: a prompt is prefilled once for its group and read once a step by all of its samples; a finished sample's slot goes to
the next one in the queue.

`defender.shared_prefix: false` takes the plain path, rollout_padded.py. Where Triton runs, a step decodes every slot, with the same shapes
each time, and is replayed as a CUDA graph (decoding_graph.py); elsewhere it decodes the slots in use.
Shapes: n rows being decoded, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

import aot_fast.kernels as K
from aot_fast.defender import rollout_padded
from aot_fast.defender.attention import Layout, PackedRow
from aot_fast.defender.decoding import KeyValues, Prefill, Step
from aot_fast.defender.decoding_graph import Members, Replayed
from aot_fast.defender.drawing import Response, Sampling, draw, response_of, uniforms
from aot_fast.defender.head import rollout_logits
from aot_fast.defender.linears import joined_projections
from aot_fast.defender.model import Defender
from aot_fast.defender.packing import prompt_inputs
from aot_fast.defender.prompt import Prompt
from aot_fast.engine import seed_of

STEPS_BETWEEN_LOOKS = 16
"""Steps on a GPU between the host's looks at who has finished: a look is a synchronisation, a finished row costs little till then."""


def sample(defender: Defender, prompts: Iterable[Prompt], seeds: Sequence[int], sampling: Sampling) -> list[list[Response]]:
    """`sampling.num_samples` responses to each prompt; sample j of prompt i draws from seed_of(seeds[i], j) whatever the batch.

    `prompts` is read as slots become free. Must run inside `defender.whole()`. No collectives.
    """
    with torch.no_grad(), rollout_logits(defender):
        if not defender.config.shared_prefix:
            return rollout_padded.sample(defender, prompts, seeds, sampling)
        with joined_projections(defender.core.model.language_model.layers if defender.runtime.device.type == "cuda" else ()):
            return _Rollout(defender, prompts, seeds, sampling).run()


@dataclass(eq=False)
class _Sample:
    """One response being drawn."""

    prompt: int
    """Number of its prompt."""
    place: int
    """Where its prompt's keys and values are."""
    number: int
    """Among the samples of its prompt."""
    position: int
    """M-RoPE position of its first token."""
    token: Tensor  # 0-d: the first one, drawn after the prefill
    logp: Tensor  # 0-d
    uniforms: Tensor  # [tokens] float64: what its tokens are drawn with
    slot: int = -1
    started: int = 0
    """Steps that the rollout had taken by then."""


class _Rollout:
    """Slots, the samples in them, and those that wait; everything of a slot is a tensor on the device."""

    def __init__(self, defender: Defender, prompts: Iterable[Prompt], seeds: Sequence[int], sampling: Sampling):
        self.defender, self.sampling, self.seeds = defender, sampling, seeds
        self.device = defender.runtime.device
        self.coming, self.next = enumerate(prompts), None
        self.waiting: deque[_Sample] = deque()
        self.active: list[_Sample] = []
        self.groups: list[list[Response | None]] = []
        size, group = defender.config.rollout_batch, sampling.num_samples
        size = min(size, group * len(seeds))
        # Twice the prompts that fill the slots, for some are kept by a last straggler; of one sample each, none is.
        places = size if group == 1 else 2 * -(-size // group)
        self.free_slots, self.free_places = list(range(size))[::-1], list(range(places))[::-1]
        self.unfinished = [0] * places  # samples of the prompt there
        self.cache = KeyValues(size, places, sampling.max_tokens, self.device)
        shape = (size, sampling.max_tokens)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.logps = torch.zeros(shape, device=self.device)
        self.uniforms = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.steps, self.positions = (torch.zeros(size, dtype=torch.long, device=self.device) for _ in range(2))
        self.done = torch.ones(size, dtype=torch.bool, device=self.device)
        # Once, for a list turned into a tensor on a GPU is a synchronisation.
        self.every = torch.arange(size, device=self.device)
        self.stop, self.banned = (torch.tensor(ids, device=self.device) for ids in (defender.stop_ids, defender.banned_ids))

        self.clock = 0
        self.members = Members(places, group, self.device) if K.backend_on(self.device) == "triton" else None
        self.replayed = Replayed(self.step_every_slot, defender.config.cuda_graph and self.device.type == "cuda")

    def run(self) -> list[list[Response]]:
        try:
            while self.refill():
                (self.decode_used_slots if self.members is None else self.decode_every_slot)()
                self.retire()
            return self.groups
        finally:
            self.replayed.close()  # it and this object hold each other, and the buffers must not wait for a collection of garbage

    # Prompts and slots

    def refill(self) -> bool:
        """Give free slots to waiting samples, prefilling prompts as long as they last; whether anything is left to decode."""
        more = True
        while more and len(self.waiting) < len(self.free_slots):
            more = self.prefill()
        while self.waiting and self.free_slots:
            self.start(self.waiting.popleft())
        return bool(self.active)

    def prefill(self) -> bool:
        """Prefill as many prompts as the free slots want and the token budget allows, at least one; False without any, or a place."""
        group, budget = self.sampling.num_samples, self.defender.config.tokens_per_microbatch
        wanted = min(-(-(len(self.free_slots) - len(self.waiting)) // group), len(self.free_places))
        taken: list[tuple[int, Prompt]] = []
        tokens = 0
        while len(taken) < wanted:
            self.next = self.next or next(self.coming, None)
            if self.next is None or (taken and tokens + len(self.next[1].ids) > budget):
                break
            tokens += len(self.next[1].ids)
            taken.append(self.next)
            self.next = None
        if not taken:
            return False
        places = [self.free_places.pop() for _ in taken]
        row = PackedRow(tuple((len(p.ids), ()) for _, p in taken), self.device, self.defender.config.attention)
        inputs = prompt_inputs(self.defender, [p for _, p in taken])
        last = torch.tensor([begin - 1 for _, begin, _ in row.starts], device=self.device)
        layout = Prefill(self.cache, row, places)
        logits = self.defender.core(**inputs, attention_mask=None, layout=layout, logits_to_keep=last, use_cache=False).logits[0]
        for (number, prompt), place, row_logits in zip(taken, places, logits):
            self.begin(number, prompt, place, row_logits)
        return True

    def begin(self, number: int, prompt: Prompt, place: int, logits: Tensor) -> None:
        """Draw the first token of a prompt's samples from its `logits` [V]; those that end with it never need a slot."""
        count = self.sampling.num_samples
        self.groups.append([None] * count)
        chances = uniforms([seed_of(self.seeds[number], j) for j in range(count)], self.sampling.max_tokens).to(self.device)
        tokens, logps = draw(logits.expand(count, -1), chances[:, 0], self.sampling, self.banned)
        over = torch.isin(tokens, self.stop) | (self.sampling.max_tokens == 1)
        for j, ended in enumerate(over.tolist()):
            if ended:
                self.groups[number][j] = response_of(self.defender, tokens[j : j + 1].cpu(), logps[j : j + 1].cpu())
            else:
                self.waiting.append(_Sample(number, place, j, prompt.next_position, tokens[j], logps[j], chances[j]))
                self.unfinished[place] += 1
        if not self.unfinished[place]:
            self.free_places.append(place)

    def start(self, sample: _Sample) -> None:
        """Put a sample with its first token into a free slot."""
        slot = sample.slot = self.free_slots.pop()
        self.tokens[slot, 0], self.logps[slot, 0] = sample.token, sample.logp
        self.uniforms[slot] = sample.uniforms
        self.steps[slot], self.positions[slot], self.done[slot] = 0, sample.position, False
        sample.started = self.clock
        self.active.append(sample)
        self.active.sort(key=lambda s: (s.place, s.prompt, s.number))

    # Steps

    def decode_every_slot(self) -> None:
        """Steps till the host looks again, or the last sample must have ended."""
        self.members.put(self.active, self.cache.lengths)
        self.replayed.depends_on(self.cache.moved)
        longest = max(s.started for s in self.active) + self.sampling.max_tokens - 1 - self.clock
        steps = min(STEPS_BETWEEN_LOOKS, longest)
        for _ in range(steps):
            self.replayed()
        self.clock += steps

    def step_every_slot(self) -> None:
        self.advance(self.members.layout(self.cache, self.steps), self.every)

    def decode_used_slots(self) -> None:
        """One step, or on a GPU as many as till the host looks again."""
        rows, longest = self.rows()
        for step in range(1 if self.device.type == "cpu" else STEPS_BETWEEN_LOOKS):
            self.step(*rows, min(longest + step, self.sampling.max_tokens))

    def rows(self) -> tuple[tuple[Tensor, list[tuple[int, int]], slice | None, bool], int]:
        """What Step wants of the active samples, those of a prompt together; tokens of the longest after the next step."""
        numbers = [s.slot for s in self.active]
        slots, first = torch.tensor(numbers, device=self.device), numbers[0]
        runs = [(place, len(list(run))) for place, run in groupby(s.place for s in self.active)]
        span = slice(first, first + len(numbers)) if numbers == list(range(first, first + len(numbers))) else None
        steps = self.steps[slots].tolist()
        # Where the host looks again only after some steps, samples end in between and stand still.
        return (slots, runs, span, self.device.type == "cpu" and len(set(steps)) == 1), max(steps) + 1

    def step(self, slots: Tensor, runs: list[tuple[int, int]], span: slice | None, in_step: bool, longest: int) -> None:
        """One more token of every sample in `slots` that is not done."""
        self.advance(Step(self.cache, slots, self.steps[slots], runs, longest, span, in_step), slots)

    def advance(self, layout: Layout, slots: Tensor) -> None:
        """One more token of every sample in `slots` [n] that is not done; no synchronisation."""
        steps = self.steps[slots]
        inputs = {"input_ids": self.tokens[slots, steps][:, None], "position_ids": (self.positions[slots] + steps).expand(3, -1)[..., None]}
        logits = self.defender.core(**inputs, attention_mask=None, layout=layout, use_cache=False).logits[:, -1]
        following = (steps + 1).clamp_max(self.sampling.max_tokens - 1)
        token, logp = draw(logits, self.uniforms[slots, following], self.sampling, self.banned)
        done = self.done[slots]
        self.tokens[slots, following] = torch.where(done, self.tokens[slots, following], token)
        self.logps[slots, following] = torch.where(done, self.logps[slots, following], logp)
        self.steps[slots] = torch.where(done, steps, following)
        ended = (token[:, None] == self.stop).any(-1) | (following == self.sampling.max_tokens - 1)
        self.done[slots] = done | ended

    def retire(self) -> None:
        """Take finished samples out of their slots."""
        finished = self.done.tolist()
        lengths = (self.steps + 1).tolist()
        for sample in [s for s in self.active if finished[s.slot]]:
            n = lengths[sample.slot]
            ids, logp = self.tokens[sample.slot, :n].cpu(), self.logps[sample.slot, :n].cpu()
            self.groups[sample.prompt][sample.number] = response_of(self.defender, ids, logp)
            self.active.remove(sample)
            self.free_slots.append(sample.slot)
            self.unfinished[sample.place] -= 1
            if not self.unfinished[sample.place]:
                self.free_places.append(sample.place)
