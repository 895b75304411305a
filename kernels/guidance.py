"""Classifier-free guidance with the norm of the conditional velocity, as Qwen-Image applies it (MATH section 3).

    u = v_u + w (v_c - v_u);   v = u |v_c| / max(|u|, tiny)  per token, norms over the channels

v_c, v_u: [B, tokens, channels]. Floor: two reads, and one write where v is kept. Backward, with n = |v_c|, m = |u|, g = dL/dv:

    dL/du = n/m g - n/m^3 (g . u) u;   dL/dv_c = w dL/du + (g . u) / (m n) v_c;   dL/dv_u = (1 - w) dL/du
"""

import torch
from torch import Tensor

from .arguments import FLOATS, compute_dtype, require, require_tensor
from .dispatch import implementation
from .fixed_order import fixed_order_sum

TINY = torch.finfo(torch.float32).tiny


def guided_velocity(v: Tensor, v_uncond: Tensor, *, guidance: float, rescale: bool = True) -> Tensor:
    """The guided velocity in fp32 (fp64 for fp64 inputs), differentiable in v and v_uncond.

    v, v_uncond: same shape and device, any float dtype; with rescale [B, tokens, channels], else [B, ...]. guidance: w, 1 is no guidance.
    A token whose |u| or |v| is not above the smallest normal fp32 number sends no gradient through that norm. Raises ValueError on a wrong
    shape or dtype.
    """
    check_guidance(v, v_uncond, rescale)
    return implementation("guided_velocity", v, v_uncond)(v, v_uncond, guidance, rescale)


def check_guidance(v: Tensor, v_uncond: Tensor, rescale: bool) -> None:
    """Checks what guided_velocity and the steps have in common."""
    require(v.dim() >= 1 and v.dtype in FLOATS, "v", f"shape {tuple(v.shape)}, {v.dtype}", "a float tensor [B, ...]")
    require(not rescale or v.dim() == 3, "v", f"shape {tuple(v.shape)}", "[B, tokens, channels] for guidance with rescale")
    require_tensor("v_uncond", v_uncond, v.shape, FLOATS, like=v)


def guided_velocity_reference(v: Tensor, v_uncond: Tensor, guidance: float, rescale: bool) -> Tensor:
    dtype = compute_dtype(v, v_uncond)
    v, v_uncond = v.to(dtype), v_uncond.to(dtype)
    return _Rescaled.apply(v, v_uncond, guidance) if rescale else _mix(v, v_uncond, guidance)


def _mix(v: Tensor, v_uncond: Tensor, guidance: float) -> Tensor:
    return v_uncond + (v - v_uncond) * guidance


def _norm(x: Tensor) -> Tensor:
    return fixed_order_sum(x.square()).sqrt().to(x.dtype).unsqueeze(-1)


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v: Tensor, v_uncond: Tensor, guidance: float) -> Tensor:
        ctx.save_for_backward(v, v_uncond)
        ctx.guidance = guidance
        u = _mix(v, v_uncond, guidance)
        return u / _norm(u).clamp(min=TINY) * _norm(v)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):
        v, v_uncond = ctx.saved_tensors
        u = _mix(v, v_uncond, ctx.guidance)
        m, n = _norm(u), _norm(v)
        safe_m, safe_n = m.clamp(min=TINY), n.clamp(min=TINY)
        direction = torch.where(m > TINY, u / safe_m, 0)
        along = fixed_order_sum(g * direction).to(g.dtype).unsqueeze(-1)
        du = torch.where(m > TINY, (g - along * direction) * (n / safe_m), 0)
        dv = ctx.guidance * du + along * torch.where(n > TINY, v / safe_n, 0)
        return dv, (1 - ctx.guidance) * du, None
