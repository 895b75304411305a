"""Rotary position embedding of queries and keys in one pass, as the Qwen-VL text layers apply it.

    out = x cos + rotate(x) sin,   rotate([x1, x2]) = [-x2, x1]

Backward: dx = g cos + rotate'(g sin), rotate' the transpose, [x1, x2] -> [x2, -x1]. Shapes: B sequences, A and K heads of queries and keys,
T tokens, D values a head (even). Floor: one read and one write of q and k.
"""

import torch
from torch import Tensor

from .arguments import FLOATS, require, require_tensor
from .dispatch import implementation


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k rotated, in their own dtype, differentiable in both.

    q: [B, A, T, D], k: [B, K, T, D], of one float dtype; cos, sin: [B, T, D], any float dtype, without gradient. Computed in fp32 and
    rounded once. On a GPU the results lie in memory as [B, T, heads, D], as variable-length attention takes them. Raises ValueError on a
    wrong shape or dtype.
    """
    require(q.dim() == 4 and q.dtype in FLOATS, "q", f"shape {tuple(q.shape)}, {q.dtype}", "a float tensor [B, A, T, D]")
    batch, _, tokens, dim = q.shape
    require(dim % 2 == 0, "q", f"shape {tuple(q.shape)}", "an even last dimension")
    require_tensor("k", k, (batch, None, tokens, dim), (q.dtype,), like=q)
    require_tensor("cos", cos, (batch, tokens, dim), FLOATS, like=q)
    require_tensor("sin", sin, (batch, tokens, dim), FLOATS, like=q)
    return implementation("rotary", q, k)(q, k, cos, sin)


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    cos, sin = cos[:, None].to(dtype), sin[:, None].to(dtype)

    def rotated(x: Tensor) -> Tensor:
        first, second = x.to(dtype).chunk(2, -1)
        return (torch.cat([first, second], -1) * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

    return rotated(q), rotated(k)
