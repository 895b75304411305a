"""One step of the denoising chain with its log-probability, and the replay of a stored step (MATH section 3).

    x_next = a x + b v + S z                                     a, b, S: aot_fast.kernels.flow_dynamics
    logp = mean over elements of -(x_next - mean)^2 / (2 S^2) - ln S - ln(2 pi) / 2;   cps as published: mean of -(x_next - mean)^2
    kl = mean((mean - mean_ref)^2) / (2 S^2), or with kl="flow_grpo" / (2 g^2);   drift = mean((mean - mean_old)^2)
    dlogp/dv = b (x_next - mean) / (S^2 n), cps as published 2 b (x_next - mean) / n;   dkl/dv = b (mean - mean_ref) / (S^2 n)

B samples of n elements, shape [B, ...]. Floor: flow_step reads x, v (and noise) and writes x_next; flow_logp reads x, v, x_next (and v_ref,
v_old) twice and writes dv. Both score a step with the same function, and sums are in a fixed order: given the same v, replay gives the
rollout's log-probability to the bit, alone or in any batch.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import FLOATS, compute_dtype, require, require_choice, require_tensor
from .dispatch import implementation
from .fixed_order import fixed_order_sum
from .flow_dynamics import FlowCoefficients, Scalar, flow_coefficients
from .guidance import check_guidance, guided_velocity_reference
from .philox import philox_normal


class Guidance(NamedTuple):
    """How v becomes the velocity of the step."""

    v_uncond: Tensor | None
    """None: no guidance."""
    scale: float
    rescale: bool


class FlowStep(NamedTuple):
    """A step taken."""

    x_next: Tensor
    """[B, ...] in the storage dtype, without a graph."""
    logp: Tensor
    """[B] fp32 (fp64 for fp64 inputs): of x_next as stored; 0 where S = 0."""


class FlowLogProb(NamedTuple):
    """A stored step scored under v, [B] fp32 (fp64 for fp64 inputs) each."""

    logp: Tensor
    kl: Tensor | None
    """to v_ref; None without it, 0 where S = 0."""
    drift: Tensor | None
    """b^2 mean((v - v_old)^2); None without v_old."""


def flow_step(
    x: Tensor,
    v: Tensor,
    sigma: Scalar,
    sigma_next: Scalar,
    *,
    dynamics: str = "flow_sde",
    eta: Scalar,
    sigma_max: Scalar | None = None,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    rescale: bool = True,
    cps_logp: str = "published",
    storage_dtype: torch.dtype | None = None,
) -> FlowStep:
    """Takes the step sigma -> sigma_next and scores it.

    x, v, v_uncond, noise: [B, ...] float, same shape. sigma, sigma_next, eta, sigma_max, dynamics: as flow_coefficients. noise, or seeds:
    int64 [B] for philox_normal, a new seed for every step; neither is needed for dynamics="ode", and both are ignored where S = 0.
    v_uncond, guidance, rescale: as guided_velocity. cps_logp: "published" or "gaussian". storage_dtype: what x_next is rounded to before it
    is scored (None: x's). logp is differentiable in v and v_uncond; x is a constant. Raises ValueError on a wrong shape, dtype, choice or
    range, and without noise for a stochastic dynamics.
    """
    _check(x, v, v_uncond, rescale, cps_logp, x_like={"noise": noise})
    require(noise is None or seeds is None, "noise", "noise and seeds", "one of them")
    still = dynamics == "ode" or (not isinstance(eta, Tensor) and eta == 0) or (not isinstance(sigma_next, Tensor) and sigma_next == 0)
    require(still or noise is not None or seeds is not None, "noise", None, f"noise or seeds for dynamics {dynamics!r}")
    if seeds is not None:
        require_tensor("seeds", seeds, x.shape[:1], (torch.int64,), like=x)
    storage = x.dtype if storage_dtype is None else storage_dtype
    require(storage in FLOATS, "storage_dtype", storage, f"one of {FLOATS}")
    step = _coefficients(x, sigma, sigma_next, dynamics, eta, sigma_max)
    published = dynamics == "cps" and cps_logp == "published"
    return implementation("flow_step", x, v, v_uncond)(x, v, Guidance(v_uncond, guidance, rescale), step, noise, seeds, published, storage)


def flow_logp(
    x: Tensor,
    v: Tensor,
    x_next: Tensor,
    sigma: Scalar,
    sigma_next: Scalar,
    *,
    dynamics: str,
    eta: Scalar,
    sigma_max: Scalar | None = None,
    v_ref: Tensor | None = None,
    v_old: Tensor | None = None,
    kl: str = "exact",
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    rescale: bool = True,
    cps_logp: str = "published",
) -> FlowLogProb:
    """Scores a stored step x -> x_next under v; differentiable in v and v_uncond, the rest are constants.

    x, v, x_next, v_ref, v_old, v_uncond: [B, ...] float, same shape; v_ref and v_old are already guided. sigma, sigma_next, eta, sigma_max,
    dynamics: as flow_coefficients. kl: "exact" or "flow_grpo". v_uncond, guidance, rescale: as guided_velocity. cps_logp: "published" or
    "gaussian". Where S = 0, logp = kl = 0 with zero gradient. Raises ValueError on a wrong shape, dtype, choice or range.
    """
    _check(x, v, v_uncond, rescale, cps_logp, x_like={"x_next": x_next, "v_ref": v_ref, "v_old": v_old})
    require_choice("kl", kl, ("exact", "flow_grpo"))
    step = _coefficients(x, sigma, sigma_next, dynamics, eta, sigma_max)
    published = dynamics == "cps" and cps_logp == "published"
    return implementation("flow_logp", x, v, v_uncond)(
        x, v, Guidance(v_uncond, guidance, rescale), x_next, step, v_ref, v_old, published, kl == "flow_grpo"
    )


def _check(x: Tensor, v: Tensor, v_uncond: Tensor | None, rescale: bool, cps_logp: str, x_like: dict[str, Tensor | None]) -> None:
    require(x.dim() >= 2 and x.dtype in FLOATS, "x", f"shape {tuple(x.shape)}, {x.dtype}", "a float tensor [B, ...]")
    if v_uncond is not None:
        check_guidance(v, v_uncond, rescale)
    for name, tensor in {"v": v, **x_like}.items():
        if tensor is not None:
            require_tensor(name, tensor, x.shape, FLOATS, like=x)
    require_choice("cps_logp", cps_logp, ("published", "gaussian"))


def _coefficients(x: Tensor, sigma: Scalar, sigma_next: Scalar, dynamics: str, eta: Scalar, sigma_max: Scalar | None) -> FlowCoefficients:
    step = flow_coefficients(sigma, sigma_next, dynamics=dynamics, eta=eta, sigma_max=sigma_max, batch=len(x))
    # From a host in one copy.
    return step if step.a.device == x.device else FlowCoefficients(*torch.stack(step).to(x.device, non_blocking=True))


def flow_step_reference(
    x: Tensor,
    v: Tensor,
    guide: Guidance,
    step: FlowCoefficients,
    noise: Tensor | None,
    seeds: Tensor | None,
    published: bool,
    storage: torch.dtype,
) -> FlowStep:
    velocity = _velocity(v, guide)
    with torch.no_grad():
        dtype = compute_dtype(x, velocity)
        x_next = _mean(x.to(dtype), velocity.to(dtype), step)
        if seeds is not None:
            noise = philox_normal(seeds, x[0].numel()).view(x.shape) if len(x) else torch.zeros_like(x)
        if noise is not None:
            std = _column(step.std, x_next)
            x_next = torch.where(std > 0, x_next + std * noise.to(dtype), x_next)
        x_next = x_next.to(storage)
    return FlowStep(x_next, _score(x, velocity, x_next, step, None, None, published, False).logp)


def flow_logp_reference(
    x: Tensor,
    v: Tensor,
    guide: Guidance,
    x_next: Tensor,
    step: FlowCoefficients,
    v_ref: Tensor | None,
    v_old: Tensor | None,
    published: bool,
    flow_grpo_kl: bool,
) -> FlowLogProb:
    return _score(x, _velocity(v, guide), x_next, step, v_ref, v_old, published, flow_grpo_kl)


def _velocity(v: Tensor, guide: Guidance) -> Tensor:
    if guide.v_uncond is None:
        return v.to(compute_dtype(v))
    return guided_velocity_reference(v, guide.v_uncond, guide.scale, guide.rescale)


def _score(x, velocity, x_next, step: FlowCoefficients, v_ref, v_old, published: bool, flow_grpo_kl: bool) -> FlowLogProb:
    dtype = compute_dtype(x, velocity)
    x, x_next, v_ref, v_old = (None if t is None else t.detach().to(dtype) for t in (x, x_next, v_ref, v_old))
    return FlowLogProb(*_Score.apply(velocity.to(dtype), x, x_next, v_ref, v_old, step, published, flow_grpo_kl))


def _mean(x: Tensor, velocity: Tensor, step: FlowCoefficients) -> Tensor:
    """The one place that forms the mean: two products and a sum, each rounded, so that rollout and replay agree to the bit."""
    return _column(step.a, x) * x + _column(step.b, x) * velocity


def _column(scalars: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] in like's dtype."""
    return scalars.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _mean_square(x: Tensor) -> Tensor:
    """[B, ...] -> [B] in fp64, in a fixed order."""
    return fixed_order_sum(x.square().flatten(1)) / max(1, x[0].numel() if len(x) else 1)


class _Score(torch.autograd.Function):
    """logp, kl and drift of velocity; the module docstring has the derivatives."""

    @staticmethod
    def forward(ctx, velocity, x, x_next, v_ref, v_old, step: FlowCoefficients, published: bool, flow_grpo_kl: bool):
        ctx.save_for_backward(velocity, x, x_next, v_ref, v_old, *step)
        ctx.options = published, flow_grpo_kl
        ctx.set_materialize_grads(False)
        variance, kl_variance = _variances(step, flow_grpo_kl)
        logp = -_mean_square(x_next - _mean(x, velocity, step))
        if not published:
            logp = logp / (2 * variance) - 0.5 * torch.log(2 * math.pi * variance)
        logp = torch.where(step.std > 0, logp, 0).to(velocity.dtype)
        kl = drift = None
        if v_ref is not None:
            kl = step.b.square() * _mean_square(velocity - v_ref) / (2 * kl_variance)
            kl = torch.where(step.std > 0, kl, 0).to(velocity.dtype)
        if v_old is not None:
            drift = (step.b.square() * _mean_square(velocity - v_old)).to(velocity.dtype)
        return logp, kl, drift

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp: Tensor | None, dkl: Tensor | None, ddrift: Tensor | None):
        velocity, x, x_next, v_ref, v_old, *step = ctx.saved_tensors
        step = FlowCoefficients(*step)
        published, flow_grpo_kl = ctx.options
        variance, kl_variance = _variances(step, flow_grpo_kl)
        n = max(1, velocity[0].numel() if len(velocity) else 1)
        gradient = torch.zeros_like(velocity)

        def add(upstream: Tensor | None, scale: Tensor, difference: Tensor, stochastic: bool = True) -> None:
            scale = upstream.double() * scale / n
            scale = torch.where(step.std > 0, scale, 0) if stochastic else scale
            # Where S = 0 a product with a non-finite difference would not be zero.
            gradient.add_(torch.where(_column(scale, difference) != 0, _column(scale, difference) * difference, 0))

        if dlogp is not None:
            add(dlogp, 2 * step.b if published else step.b / variance, x_next - _mean(x, velocity, step))
        if dkl is not None:
            add(dkl, step.b.square() / kl_variance, velocity - v_ref)
        if ddrift is not None:
            add(ddrift, 2 * step.b.square(), velocity - v_old, stochastic=False)
        return gradient, *(None for _ in range(7))


def _variances(step: FlowCoefficients, flow_grpo_kl: bool) -> tuple[Tensor, Tensor]:
    """S^2 and what the KL divides by, 1 where S = 0."""
    variance = torch.where(step.std > 0, step.std.square(), 1)
    return variance, torch.where(step.std > 0, step.diffusion.square(), 1) if flow_grpo_kl else variance
