"""Policy losses over denoising steps (MATH section 3): Flow-GRPO, GRPO-Guard, DPPO.

    A = clamp(A, -adv_clip, adv_clip);  d = clamp(logp - old, -20, 20);  r = e^d
    grpo   l = max(-A r, -A clip(r, 1 - clip, 1 + clip))
    guard  r = exp(clamp((logp - old + drift / (2 std^2)) std, -20, 20)),  l as grpo, divided by -dt
    dppo   l = -A r, and 0 where drift / (2 std^2) >= tau and the step moves away from the old policy (A > 0 and r > 1, or A < 0 and r < 1)
    L = sum over samples of (l + beta kl) / count

B samples (of all trained steps in the call). Floor: a launch. The gradients are formed in the forward pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import FLOATS, compute_dtype, require, require_choice, require_tensor
from .dispatch import implementation
from .known_gradient import attach_gradients
from .metrics import PolicyLoss, finish_metrics, masked_max
from .policy_loss import LOG_RATIO_LIMIT


@dataclass(frozen=True)
class FlowPolicySettings:
    """The settings of the loss; meanings in flow_policy_loss."""

    clip: float | None
    beta: float
    variant: str
    tau: float
    adv_clip: float


def flow_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    clip: float | None,
    kl: Tensor | None = None,
    beta: float = 0.0,
    variant: str = "grpo",
    drift: Tensor | None = None,
    std: float | Tensor | None = None,
    dt: float | Tensor | None = None,
    tau: float = 1e-5,
    adv_clip: float = 5.0,
    mask: Tensor | None = None,
    count: float | Tensor | None = None,
) -> PolicyLoss:
    """The loss of B scored steps and its metrics; differentiable in logp, kl and (guard) drift.

    logp, old_logp, advantages, kl, drift: [B] float; mask: [B] bool, False leaves a sample out, whatever the others hold there. clip: the
    range around 1, more than 0 (dppo has none and takes None). beta: weight of kl, at least 0 (more than 0 needs kl). variant: "grpo";
    "guard", needs drift, std and dt; "dppo", needs drift and std. std: S of the step, dt: sigma_next - sigma, both a float, 0-d or [B]; a
    sample with std = 0 has no log-prob: its ratio is 1 and its drift ignored. tau: at least 0. adv_clip: more than 0. count: the global
    number of samples of the optimizer step, a float or 0-d tensor; None: the local count, at least 1. A mean over trained steps is a larger
    count. Returns PolicyLoss(loss 0-d, metrics): names in aot_fast.kernels.metrics. Raises ValueError on a wrong shape, dtype, choice or
    range.
    """
    settings = FlowPolicySettings(clip, beta, variant, tau, adv_clip)
    require_tensor("logp", logp, (None,), FLOATS)
    for name, tensor in {"old_logp": old_logp, "advantages": advantages, "kl": kl, "drift": drift}.items():
        if tensor is not None:
            require_tensor(name, tensor, logp.shape, FLOATS, like=logp)
    if mask is not None:
        require_tensor("mask", mask, logp.shape, (torch.bool,), like=logp)
    require_choice("variant", variant, ("grpo", "guard", "dppo"))
    require(variant == "dppo" or (clip is not None and clip > 0), "clip", clip, f"more than 0 for variant {variant!r}")
    require(beta >= 0, "beta", beta, "at least 0")
    require(beta == 0 or kl is not None, "kl", None, f"[B] because beta is {beta}")
    require(tau >= 0, "tau", tau, "at least 0")
    require(adv_clip > 0, "adv_clip", adv_clip, "more than 0")
    needs = {"grpo": {}, "dppo": {"drift": drift, "std": std}, "guard": {"drift": drift, "std": std, "dt": dt}}[variant]
    for name, value in needs.items():
        require(value is not None, name, None, f"a value for variant {variant!r}")
    std, dt = (None if value is None else _per_sample(name, value, logp) for name, value in (("std", std), ("dt", dt)))
    return implementation("flow_policy_loss", logp)(logp, old_logp, advantages, kl, drift, std, dt, mask, count, settings)


def _per_sample(name: str, value: float | Tensor, logp: Tensor) -> Tensor:
    dtype = compute_dtype(logp)
    if not isinstance(value, Tensor):
        return torch.full_like(logp, value, dtype=dtype)
    require(value.shape in ((), logp.shape), name, f"shape {tuple(value.shape)}", f"a float, or shape () or {tuple(logp.shape)}")
    return value.detach().to(logp.device, dtype, non_blocking=True).expand(logp.shape)


def flow_policy_loss_reference(
    logp: Tensor,
    old: Tensor,
    advantages: Tensor,
    kl: Tensor | None,
    drift: Tensor | None,
    std: Tensor | None,
    dt: Tensor | None,
    mask: Tensor | None,
    count: float | Tensor | None,
    s: FlowPolicySettings,
) -> PolicyLoss:
    given = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    dtype = compute_dtype(logp)
    weight = 1.0 / (given.sum().clamp(min=1).to(dtype) if count is None else torch.as_tensor(count, dtype=dtype, device=logp.device))
    with torch.enable_grad():
        new, old, advantages, kl_leaf, drift_leaf = (
            None if t is None else torch.where(given, t.detach().to(dtype), 0) for t in (logp, old, advantages, kl, drift)
        )
        leaves = [t.requires_grad_() for t in (new, kl_leaf, drift_leaf) if t is not None]
        clamped = advantages.clamp(-s.adv_clip, s.adv_clip)
        terms, ratio, metrics = _terms(new, old, clamped, drift_leaf, std, dt, given, s)
        if s.beta > 0:
            terms = terms + s.beta * kl_leaf
        value = (torch.where(given, terms, 0).double() * weight).sum()
        gradients = iter(torch.autograd.grad(value, leaves, allow_unused=True))
    known = [None if t is None else next(gradients) for t in (new, kl_leaf, drift_leaf)]
    metrics |= _metrics(ratio.detach(), (new - old).detach(), advantages, clamped, kl_leaf, drift_leaf, given)
    metrics["count/zero_coefficient"] = (given & (known[0] == 0)).sum()
    loss = attach_gradients(value.detach().to(dtype), (logp, kl, drift), known)
    return PolicyLoss(loss, finish_metrics(metrics))


def _terms(
    new: Tensor,
    old: Tensor,
    advantages: Tensor,
    drift: Tensor | None,
    std: Tensor | None,
    dt: Tensor | None,
    mask: Tensor,
    s: FlowPolicySettings,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """l of the equation, the ratio, and the counts that only make sense here."""
    log_ratio = new - old
    if s.variant != "grpo":
        stochastic = mask & (std > 0)
        safe_std = torch.where(stochastic, std, 1)
        divergence = torch.where(stochastic, drift, 0) / (2 * safe_std.square())
    if s.variant == "guard":
        log_ratio = (log_ratio + divergence) * safe_std
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    unclipped = -advantages * ratio
    if s.variant == "dppo":
        away = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
        dropped = away & (divergence >= s.tau)
        return torch.where(dropped, 0, unclipped), ratio, {"count/dropped": (mask & dropped).sum()}
    terms = torch.maximum(unclipped, -advantages * ratio.clamp(1 - s.clip, 1 + s.clip))
    if s.variant == "guard":
        terms = terms / torch.where(mask, -dt, 1)
    low, high = (advantages < 0) & (ratio < 1 - s.clip), (advantages > 0) & (ratio > 1 + s.clip)
    return terms, ratio, {"count/clip_low": (mask & low).sum(), "count/clip_high": (mask & high).sum()}


def _metrics(
    ratio: Tensor, log_ratio: Tensor, advantages: Tensor, clamped: Tensor, kl: Tensor | None, drift: Tensor | None, mask: Tensor
) -> dict[str, Tensor]:
    d = torch.where(mask, log_ratio, 0).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    sums = {
        "ratio": ratio,
        "kl_k1": -d,
        "kl_k3": torch.expm1(d) - d,
        "advantage": clamped,
        "advantage_squared": clamped.square(),
        "kl": kl,
        "drift": drift,
    }
    return {
        "count/samples": mask.sum(),
        "count/masked": (~mask).sum(),
        "count/advantage_clipped": (mask & (advantages != clamped)).sum(),
        "max/ratio_deviation": masked_max((ratio - 1).abs(), mask),
        **{f"sum/{name}": torch.where(mask, v.detach(), 0).double().sum() for name, v in sums.items() if v is not None},
    }
