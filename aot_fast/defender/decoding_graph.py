"""Decoding with shapes that never change: a step takes every slot, those without a sample too, and which rows read which prompt is data.
So one CUDA graph serves the whole rollout; without one, the host's calls take several times as long as a small batch on the GPU.

Shapes: S slots, Q places for prompts, G samples of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

import aot_fast.kernels as K
from aot_fast.defender.decoding import KeyValues

WARM_UP = 2
"""Calls that run as they are: they compile kernels and make buffers, which a graph must find made."""


class Sample(Protocol):
    """Who sits where."""

    place: int
    number: int
    slot: int


class Members:
    """Which slots read which prompt, on the device and at the same addresses for good."""

    def __init__(self, num_places: int, num_samples: int, device: torch.device):
        self.table = torch.full((num_places, num_samples), -1, dtype=torch.int32, device=device)
        self.lengths = torch.ones(num_places, dtype=torch.int32, device=device)

    def put(self, samples: Iterable[Sample], lengths: Sequence[int]) -> None:
        """These samples are being decoded; lengths: of the prompt at each place."""
        table = torch.full(self.table.shape, -1, dtype=torch.int32)
        for sample in samples:
            table[sample.place, sample.number] = sample.slot
        self.table.copy_(table)
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32).clamp_min(1))

    def layout(self, cache: KeyValues, steps: Tensor) -> EveryRow:
        """For one step; steps: [S] int64."""
        return EveryRow(cache, self.table, self.lengths, steps.to(torch.int32))


@dataclass(frozen=True)
class EveryRow:
    """Layout (attention.py) of a forward pass over one token of every slot."""

    cache: KeyValues
    members: Tensor  # [Q, G] int32
    lengths: Tensor  # [Q] int32
    steps: Tensor  # [S] int32

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x[:, :, 0] for x in (q, k, v))
        buffers = self.cache.prompts[layer], self.cache.own_whole(layer, k)
        return K.decode_attention(q, k, v, *buffers, self.lengths, self.members, self.steps, scale=scale)[:, None]


class Replayed:
    """Work without arguments, results or synchronisation that runs as a CUDA graph after its first calls."""

    def __init__(self, work: Callable[[], None], graphed: bool):
        self.work: Callable[[], None] | None = work
        self.graphed = graphed
        self.graph: torch.cuda.CUDAGraph | None = None
        self.num_calls = 0
        self.made_for: object = None

    def depends_on(self, state: object) -> None:
        """A graph of another state is of no more use, and kernels for other sizes may have to be compiled first."""
        if state != self.made_for:
            self.graph, self.made_for, self.num_calls = None, state, min(self.num_calls, WARM_UP - 1)

    def close(self) -> None:
        """Give up the graph and what it holds."""
        self.graph, self.work = None, None

    def __call__(self) -> None:
        self.num_calls += 1
        if not self.graphed or self.num_calls <= WARM_UP:
            self.work()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # Threads that lay the next prompts into page-locked memory may go on: only this one's calls are recorded.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.work()  # recorded, not run
        self.graph.replay()
