"""The flash-attention calls behind shared prompts: on a CPU group by group, on a GPU two variable-length calls for the whole row.

All take and return [1, heads, T, D]; lse is [1, A, T], in fp32 (fp64 for fp64). `row`: a PackedRow (attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aot_fast.defender.attention import PackedRow


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of both parts from that over each: outputs [..., D], log-sum-exps [...]."""
    lse = torch.logaddexp(lse_a, lse_b)
    out = torch.exp(lse_a - lse)[..., None] * out_a + torch.exp(lse_b - lse)[..., None] * out_b
    return out.to(out_a.dtype), lse


class Fold(NamedTuple):
    """Responses that follow each other in a row, as a batch padded on the right. Shapes: n responses, R the longest."""

    index: Tensor  # [n, R] int64: the token, counted from the first response's first; padding repeats a response's last
    live: Tensor  # [n, R] bool
    places: Tensor | None
    """[tokens] int64: where in the flattened batch each token is; None: lengths are equal, and nothing has to be moved."""

    def fold(self, x: Tensor) -> Tensor:
        """[n, heads, R, D] of [1, heads, tokens, D]."""
        picked = x[0].unflatten(1, self.index.shape) if self.places is None else x[0][:, self.index]
        return picked.transpose(0, 1)

    def unfold(self, x: Tensor) -> Tensor:
        """Inverse of `fold`, also for [n, heads, R]."""
        flat = x.transpose(0, 1).flatten(1, 2)
        return (flat if self.places is None else flat[:, self.places])[None]


def fold_of(lengths: Sequence[int], device: torch.device) -> Fold:
    """The fold of responses of these lengths."""
    starts = torch.tensor([0, *accumulate(lengths)][: len(lengths)], dtype=torch.long)
    own = torch.tensor(lengths, dtype=torch.long)
    steps = torch.arange(max(lengths, default=0))
    index, live = starts[:, None] + torch.minimum(steps, own[:, None] - 1), steps < own[:, None]
    places = None if bool(live.all()) else live.flatten().nonzero()[:, 0].to(device)
    return Fold(index.to(device), live.to(device), places)


_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, row: PackedRow, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp: a call for each prompt, one for its responses among themselves, one for them on the prompt."""
    outs, lses = [], []
    for (first, begin, end), fold in zip(row.starts, row.folds):
        prompt, responses = ([x[:, :, a:b] for x in (q, k, v)] for a, b in ((first, begin), (begin, end)))
        out, lse = _flash_cpu(*prompt, is_causal=True, scale=scale)
        outs.append(out)
        lses.append(lse)
        if end > begin:
            own, own_lse = _flash_cpu(*(fold.fold(x) for x in responses), is_causal=True, scale=scale)
            past, past_lse = _flash_cpu(responses[0], *prompt[1:], scale=scale)
            out, lse = merge(fold.unfold(own), fold.unfold(own_lse), past, past_lse)
            outs.append(out)
            lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def cpu_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, row: PackedRow, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for (first, begin, end), fold in zip(row.starts, row.folds):
        g, qs, ks, vs, o = ([x[:, :, a:b] for a, b in ((first, begin), (begin, end))] for x in (gradient, q, k, v, out))
        dq, dk, dv = _flash_cpu_backward(g[0], qs[0], ks[0], vs[0], o[0], lse[:, :, first:begin], 0.0, True, scale=scale)
        if end == begin:
            parts.append((dq, dk, dv))
            continue
        l_response = lse[:, :, begin:end]
        past = _flash_cpu_backward(g[1], qs[1], ks[0], vs[0], o[1], l_response, 0.0, False, scale=scale)
        parts.append((dq, dk + past[1], dv + past[2]))
        # A padded query's gradient is 0, so that the keys it repeats get none.
        folded = [fold.fold(x) for x in (g[1], qs[1], ks[1], vs[1], o[1])]
        folded[0] = torch.where(fold.live[:, None, :, None], folded[0], 0)
        own = _flash_cpu_backward(*folded, fold.fold(l_response[..., None])[..., 0].contiguous(), 0.0, True, scale=scale)
        dq, dk, dv = (fold.unfold(x) for x in own)
        parts.append((past[0] + dq, dk, dv))
    return tuple(torch.cat(x, 2) for x in zip(*parts))


def attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of all queries [B, K, n, D] to all keys [B, K, tokens, D], and its log-sum-exps [B, K, n]; forward only."""
    if not q.is_cuda:
        return _flash_cpu(q, k, v, scale=scale)
    if q.dtype.itemsize == 2:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    scores = (q @ k.transpose(-1, -2)) * scale
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v, lse


class Varlen(NamedTuple):
    """A packed row for kernels that take cumulative lengths (int32)."""

    own: Tensor  # [segments + 1]
    responses: Tensor  # [groups + 1] tokens of the responses of each group
    prompts: Tensor  # [groups + 1]
    longest: tuple[int, int, int]
    """Tokens of the longest segment, of the most responses of a group, and of the longest prompt."""
    response_index: Tensor  # [response tokens] int64: their place in the row
    prompt_index: Tensor  # [prompt tokens] int64


def varlen_of(groups: Sequence[tuple[int, Sequence[int]]], device: torch.device) -> Varlen:
    """Groups: prompt length and response lengths of each."""
    segments = [n for prompt, responses in groups for n in (prompt, *responses)]
    lengths = [prompt for prompt, _ in groups], [sum(responses) for _, responses in groups]
    is_prompt = torch.cat([torch.arange(p + r) < p for p, r in zip(*lengths)])

    def cumulative(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)

    index = [is_prompt.logical_not().nonzero()[:, 0].to(device), is_prompt.nonzero()[:, 0].to(device)]
    longest = max(segments), max(lengths[1]), max(lengths[0])
    return Varlen(cumulative(segments), cumulative(lengths[1]), cumulative(lengths[0]), longest, *index)


def varlen_forward(q: Tensor, k: Tensor, v: Tensor, row: PackedRow, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in two calls: all segments causally, all responses on their prompts."""
    lengths, q, k, v = row.varlen, *(x[0].transpose(0, 1) for x in (q, k, v))  # [T, heads, D]
    run = _FORWARD[row.attention]
    out, lse = run(q, k, v, lengths.own, lengths.own, lengths.longest[0], lengths.longest[0], True, scale)
    if len(lengths.response_index):
        here, there = lengths.response_index, lengths.prompt_index
        past, past_lse = run(
            q[here], k[there], v[there], lengths.responses, lengths.prompts, lengths.longest[1], lengths.longest[2], False, scale
        )
        joined, joined_lse = merge(out[here], lse[:, here].T, past, past_lse.T)
        out, lse = out.index_copy(0, here, joined), lse.index_copy(1, here, joined_lse.T)
    return out.transpose(0, 1)[None], lse[None]


def varlen_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, row: PackedRow, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    lengths = row.varlen
    gradient, q, k, v, out = (x[0].transpose(0, 1).contiguous() for x in (gradient, q, k, v, out))
    run = _BACKWARD[row.attention]
    longest = lengths.longest
    dq, dk, dv = run(gradient, q, k, v, out, lse[0], lengths.own, lengths.own, longest[0], longest[0], True, scale)
    if len(lengths.response_index):
        here, there = lengths.response_index, lengths.prompt_index
        states = gradient[here], q[here], k[there], v[there], out[here], lse[0][:, here].contiguous()
        past = run(*states, lengths.responses, lengths.prompts, longest[1], longest[2], False, scale)
        # index_add_ of indices that occur once: no two threads add to the same place.
        dq, dk, dv = dq.index_add(0, here, past[0]), dk.index_add(0, there, past[1]), dv.index_add(0, there, past[2])
    return tuple(x.transpose(0, 1)[None] for x in (dq, dk, dv))


def _aten_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    return torch.ops.aten._flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale)[:2]


def _aten_backward(gradient, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale):
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the random state of dropout, of which there is none
    return torch.ops.aten._flash_attention_backward(
        gradient, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, unused, unused, scale=scale
    )


def _flash_attn_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    return _flash_attn_varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p=0.0, softmax_scale=scale, causal=causal)[:2]


def _flash_attn_backward(gradient, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale):
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    gradients = tuple(torch.empty_like(x) for x in (q, k, v))
    _flash_attn_varlen_backward(
        gradient,
        q,
        k,
        v,
        out,
        lse,
        *gradients,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return gradients


_FORWARD = {"sdpa": _aten_forward, "flash_attention_2": _flash_attn_forward}
_BACKWARD = {"sdpa": _aten_backward, "flash_attention_2": _flash_attn_backward}
