"""Drawing tokens: what both rollouts share. Shapes: N rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aot_fast.defender.model import Defender

BLOCK = 512
"""Tokens of the vocabulary that are summed together."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    num_samples: int
    temperature: float
    """0: greedy."""
    top_p: float
    max_tokens: int


@dataclass(frozen=True)
class Response:
    """One sampled answer, on the host."""

    ids: Tensor  # [R] int64, the stop token included
    logp: Tensor  # [R] float32, of the untruncated distribution at the sampling temperature
    text: str
    truncated: bool
    """No stop token came within the limit."""
    old_logp: Tensor | None = None  # [R] float32: the trainer's, at the policy that sampled (defender.old_logp recompute)


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """[N, count] fp64 uniforms, a row's own whatever the batch; drawn on the host so that every device samples alike."""
    rows = [torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.stack(rows)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling, banned: Tensor) -> tuple[Tensor, Tensor]:
    """Token [N] and its log-prob [N] fp32, never one of `banned` (token ids), by inverting the cumulative distribution at `uniform` [N].

    The log-prob is that of the model's own distribution at the temperature, before banning and top-p: what the trainer recomputes.
    """
    scaled = logits.float() / (sampling.temperature or 1.0)
    logp = torch.log_softmax(scaled, -1)
    allowed = logp.index_fill(1, banned, -torch.inf)
    if sampling.temperature == 0:
        token = allowed.argmax(-1)
    else:
        p = allowed.exp()
        if sampling.top_p < 1:
            sorted_p, order = torch.softmax(allowed.double(), -1).sort(-1, descending=True)
            kept = sorted_p.cumsum(-1) - sorted_p < sampling.top_p
            p = torch.zeros_like(p).scatter(-1, order, (sorted_p * kept).to(p.dtype))
        token = _inverted(p, uniform)
    return token, logp.gather(-1, token[:, None])[:, 0]


def _inverted(p: Tensor, uniform: Tensor) -> Tensor:
    """[N] int64: where the cumulative sum of p [N, V] passes `uniform` [N] of the whole, always where p > 0.

    Summed in fp64, for over 152,064 tokens a sum in fp32 loses the tail; block by block, for a running sum over all of them takes as long
    as a layer of the model.
    """
    size = p.shape[1]
    p = torch.nn.functional.pad(p, (0, -size % BLOCK)).unflatten(1, (-1, BLOCK))
    upto = p.sum(-1, dtype=torch.float64).cumsum(-1)  # [N, blocks]
    wanted = uniform[:, None] * upto[:, -1:]
    block = torch.searchsorted(upto, wanted, right=True).clamp_max(upto.shape[1] - 1)
    before = torch.where(block > 0, upto.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = p.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]
    place = torch.searchsorted(before + inside.cumsum(-1, dtype=torch.float64), wanted, right=True)
    last = BLOCK - 1 - (inside.flip(-1) > 0).int().argmax(-1, keepdim=True)  # the two sums of a block differ by roundings
    return (block * BLOCK + torch.minimum(place, last))[:, 0].clamp_max(size - 1)  # of NaN, too, a token that there is


def response_of(defender: Defender, ids: Tensor, logp: Tensor) -> Response:
    """The response of drawn tokens and log-probs [tokens], cut after its stop token."""
    ends = torch.isin(ids, torch.tensor(defender.stop_ids)).nonzero()
    length = int(ends[0]) + 1 if len(ends) else len(ids)
    text = defender.tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
    return Response(ids[:length].clone(), logp[:length].clone(), text, not len(ends))
