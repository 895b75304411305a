"""Keys and values of a rollout: a prompt's once for all of its samples, and a static buffer for what each sample has written itself.

A decoding step reads a prompt once for all rows that belong to it. Rows attend to their prompt and to themselves in two parts that are
joined by their log-sum-exps, as in training (attention.py).
Shapes: S slots, n <= S rows that are decoded, Q prompts kept, P room for a prompt, R room for a response (both grow), A query heads,
K key-value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aot_fast.defender import attention_kernels as kernels
from aot_fast.defender.attention import PackedRow

ROOM = 64
"""Tokens that prompts get room for at least, and responses begin with: few buffers have to grow, none is as long as it might be."""


class KeyValues:
    """The buffers of all layers. A layer's come into being when it first writes, for only it knows its heads."""

    def __init__(self, num_slots: int, num_prompts: int, max_tokens: int, device: torch.device):
        self.num_slots, self.num_prompts, self.max_tokens, self.device = num_slots, num_prompts, max_tokens, device
        self.prompts: dict[int, Tensor] = {}
        """Of each layer [2, Q, K, P, D]: keys and values."""
        self.own: dict[int, Tensor] = {}
        """Of each layer [2, S, K, R, D]."""
        self.lengths = [0] * num_prompts
        self.moved = 0
        """How often a buffer of prompts had to make room elsewhere."""

    def put_prompt(self, layer: int, place: int, k: Tensor, v: Tensor) -> None:
        """Keep a prompt's k and v [K, tokens, D] at `place`."""
        heads, tokens, dim = k.shape
        buffer = self.prompts.get(layer)
        if buffer is None or buffer.shape[3] < tokens:
            granule = max(ROOM, 1 << tokens.bit_length() >> 3)  # an eighth of the length, or up to a fourth
            grown = k.new_zeros(2, self.num_prompts, heads, -(-tokens // granule) * granule, dim)
            if buffer is not None:
                grown[:, :, :, : buffer.shape[3]] = buffer
            self.prompts[layer] = buffer = grown
            self.moved += 1
        buffer[0, place, :, :tokens], buffer[1, place, :, :tokens] = k, v
        self.lengths[place] = tokens

    def own_whole(self, layer: int, k: Tensor) -> Tensor:
        """The layer's buffer for all that responses may write: it never has to move. k: [S, K, D]."""
        if layer not in self.own:
            self.own[layer] = k.new_zeros(2, self.num_slots, k.shape[1], self.max_tokens, k.shape[2])
        return self.own[layer]

    def put_own(self, layer: int, slots: Tensor, steps: Tensor, longest: int, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v [n, K, D] as token `steps` [n], each below `longest`, of `slots` [n]; returns the layer's buffer."""
        if layer not in self.own:
            self.own[layer] = k.new_zeros(2, self.num_slots, k.shape[1], min(ROOM, self.max_tokens), k.shape[2])
        buffer = self.own[layer]
        if buffer.shape[3] < longest:
            more = buffer.new_zeros(*buffer.shape[:3], min(2 * longest, self.max_tokens) - buffer.shape[3], buffer.shape[4])
            self.own[layer] = buffer = torch.cat([buffer, more], 3)
        buffer[0, slots, :, steps], buffer[1, slots, :, steps] = k, v
        return buffer


@dataclass(frozen=True)
class Prefill:
    """Layout of a forward pass over whole prompts in one row, which keeps what the layers make of them."""

    cache: KeyValues
    row: PackedRow
    places: Sequence[int]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        for place, (first, begin, _) in zip(self.places, self.row.starts):
            self.cache.put_prompt(layer, place, k[0, :, first:begin], v[0, :, first:begin])
        return self.row.attend(layer, q, k, v, scale)


@dataclass(frozen=True)
class Step:
    """Layout of a forward pass over one token of each row. Rows of the same prompt follow each other."""

    cache: KeyValues
    slots: Tensor  # [n] int64
    steps: Tensor  # [n] int64: which token of its response each row writes
    runs: Sequence[tuple[int, int]]
    """Of each prompt in question: its place, and how many rows it has."""
    longest: int
    """Tokens of the longest response after this step."""
    span: slice | None = None
    """The slots, where they follow each other: the buffer is then read in place."""
    in_step: bool = False
    """Whether all rows write the token of the same number, so that none has to be hidden from another."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        own = self.cache.put_own(layer, self.slots, self.steps, self.longest, k[:, :, 0], v[:, :, 0])
        grouped = q[:, :, 0].unflatten(1, (k.shape[1], -1))  # [n, K, A / K, D]: the query heads of a key head are one more dimension
        joined, _ = kernels.merge(*self._own(own, grouped, scale), *self._past(self.cache.prompts[layer], grouped, scale))
        return joined.flatten(1, 2)[:, None]

    def _own(self, buffer: Tensor, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        k, v = buffer[:, self.slots if self.span is None else self.span, :, : self.longest]  # [n, K, tokens, D]
        scores = q.float() @ k.transpose(-1, -2).float() * scale  # as flash attention keeps them; rounded to bf16, a weight is off by 8 %
        if not self.in_step:
            unseen = torch.arange(self.longest, device=q.device) > self.steps[:, None]
            scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
        lse = scores.logsumexp(-1)
        return (scores - lse[..., None]).exp().to(q.dtype) @ v, lse

    def _past(self, buffer: Tensor, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        outs, lses, start = [], [], 0
        for place, num_prompts, count in self._alike():
            k, v = buffer[:, place : place + num_prompts, :, : self.cache.lengths[place]]  # [prompts, K, tokens, D]
            rows = (
                q[start : start + num_prompts * count].unflatten(0, (num_prompts, count)).transpose(1, 2)
            )  # [prompts, K, count, A / K, D]
            out, lse = kernels.attend_all(rows.flatten(2, 3), k, v, scale)
            outs.append(out.unflatten(2, rows.shape[2:4]).transpose(1, 2).flatten(0, 1))
            lses.append(lse.unflatten(2, rows.shape[2:4]).transpose(1, 2).flatten(0, 1))
            start += num_prompts * count
        return torch.cat(outs), torch.cat(lses)

    def _alike(self) -> list[tuple[int, int, int]]:
        """(first place, prompts, rows of each): neighbours with as many tokens and rows are read by one call."""
        found: list[tuple[int, int, int]] = []
        for place, count in self.runs:
            first, num_prompts, rows = found[-1] if found else (-1, 0, 0)
            same = found and rows == count and self.cache.lengths[first] == self.cache.lengths[place]
            if same and place == first + num_prompts:
                found[-1] = first, num_prompts + 1, count
            else:
                found.append((place, 1, count))
        return found
