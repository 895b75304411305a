"""Attention of a decoding step whose rows share their prompts (DESIGN.md section 5): a prompt's keys and values are read once for all of
its rows.

    out = softmax(scale q [prompt keys ; own keys ; new key]) [prompt values ; own values ; new value]

Shapes: S rows, A query heads, K key-value heads (A a multiple of K), D values a head, Q places for prompts, P room for a prompt, G rows
that a prompt has at most, R room for what a row has written. Floor: one read of the prompts' and rows' keys and values.
"""

import torch
from torch import Tensor

from .arguments import FLOATS, require, require_tensor
from .dispatch import implementation


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, own: Tensor, lengths: Tensor, members: Tensor, steps: Tensor, *, scale: float
) -> Tensor:
    """[S, A, D] in q's dtype; forward only. Writes k and v of the new tokens into `own`, as the token steps[s] of row s.

    q: [S, A, D]; k, v: [S, K, D]; prompts: [2, Q, K, P, D], keys and values of each prompt; own: [2, S, K, R, D], likewise of each row; all
    of one float dtype. lengths: [Q] int32, tokens of each prompt, at least 1. members: [Q, G] int32, the rows that read each prompt, -1 for
    none, a row at most once. steps: [S] int32, tokens that each row has written, below R. scale: of the scores.
    Rows that are no member have zeros and write nothing. Sums are in fp32 and their order depends on the sizes alone, not on the values:
    two calls give the same bits. Values of lengths, members and steps are not checked, which would have the host wait for the device.
    Raises ValueError on a wrong shape or dtype.
    """
    require(q.dim() == 3 and q.dtype in FLOATS, "q", f"shape {tuple(q.shape)}, {q.dtype}", "a float tensor [S, A, D]")
    rows, heads, dim = q.shape
    require(
        k.dim() == 3 and k.shape[1] > 0 and heads % k.shape[1] == 0,
        "k",
        f"shape {tuple(k.shape)}",
        f"[{rows}, K, {dim}], K dividing {heads}",
    )
    kv_heads = k.shape[1]
    for name, tensor, shape in (
        ("k", k, (rows, kv_heads, dim)),
        ("v", v, (rows, kv_heads, dim)),
        ("prompts", prompts, (2, None, kv_heads, None, dim)),
        ("own", own, (2, rows, kv_heads, None, dim)),
    ):
        require_tensor(name, tensor, shape, (q.dtype,), like=q)
    for name, tensor, shape in (
        ("lengths", lengths, prompts.shape[1:2]),
        ("members", members, (prompts.shape[1], None)),
        ("steps", steps, (rows,)),
    ):
        require_tensor(name, tensor, shape, (torch.int32,), like=q)
    require(prompts.is_contiguous() and own.is_contiguous(), "prompts and own", "strided", "contiguous buffers")
    run = implementation("decode_attention", q)
    return run(q, k, v, prompts, own, lengths, members, steps, scale)


def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, own: Tensor, lengths: Tensor, members: Tensor, steps: Tensor, scale: float
) -> Tensor:
    out, repeat = torch.zeros_like(q), q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    for place, slots in enumerate(members.tolist()):
        for slot in (s for s in slots if s >= 0):
            own[0, slot, :, steps[slot]], own[1, slot, :, steps[slot]] = k[slot], v[slot]
            keys, values = (
                torch.cat([prompts[i, place, :, : lengths[place]], own[i, slot, :, : steps[slot] + 1]], 1).to(dtype) for i in (0, 1)
            )
            grouped = q[slot].unflatten(0, (-1, repeat)).to(dtype)
            out[slot] = (torch.softmax(grouped @ keys.mT * scale, -1) @ values).flatten(0, 1)
    return out
