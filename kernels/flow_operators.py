"""The flow operators on registered operators: what the Triton and the C++ operators of one schema have in common.

`namespace` says whose operators run: torch.ops.aot_fast (Triton) or torch.ops.aot_fast_cpu (csrc).
"""

import torch
from torch import Tensor

from .flow_dynamics import FlowCoefficients
from .flow_policy_loss import FlowPolicySettings
from .flow_step import FlowLogProb, FlowStep, Guidance
from .known_gradient import attach_gradients
from .metrics import PolicyLoss

RESULTS = (
    "loss count/samples count/masked count/advantage_clipped count/clip_low count/clip_high count/dropped count/zero_coefficient "
    "sum/ratio sum/kl_k1 sum/kl_k3 sum/advantage sum/advantage_squared sum/kl sum/drift unused max/ratio_deviation"
).split()
"""What flow_policy_loss writes, in its order."""


def empty_scores(x: Tensor, v_ref: Tensor | None, v_old: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """logp, kl, drift, not yet written; empty where there is none."""
    n = x.shape[0]
    sizes = n, n if v_ref is not None else 0, n if v_old is not None else 0
    return tuple(torch.empty(size, dtype=torch.float32, device=x.device) for size in sizes)


def empty_gradients(v: Tensor, v_uncond: Tensor | None) -> tuple[Tensor, Tensor]:
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return dv, v.new_empty(0) if v_uncond is None else torch.empty(v.shape, dtype=v_uncond.dtype, device=v.device)


def empty_flow_loss(logp: Tensor, with_kl: bool, variant: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = logp.shape[0]
    sizes = len(RESULTS), n, n if with_kl else 0, n if variant == "guard" else 0
    return tuple(torch.empty(size, dtype=torch.float32, device=logp.device) for size in sizes)


def fake_step(x, v, v_uncond, noise, seeds, step, guidance, rescale, published, storage):
    return torch.empty(x.shape, dtype=storage, device=x.device), empty_scores(x, None, None)[0]


def fake_logp(x, v, v_uncond, x_next, v_ref, v_old, step, guidance, rescale, published, flow_grpo_kl):
    return empty_scores(x, v_ref, v_old)


def fake_logp_gradient(x, v, v_uncond, x_next, v_ref, v_old, step, dlogp, dkl, ddrift, guidance, rescale, published, flow_grpo_kl):
    return empty_gradients(v, v_uncond)


def fake_velocity(v, v_uncond, guidance, rescale):
    return torch.empty(v.shape, dtype=torch.float32, device=v.device)


def fake_velocity_gradient(v, v_uncond, gradient, guidance, rescale):
    return tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (v, v_uncond))


def fake_flow_loss(logp, old, advantages, kl, drift, std, dt, mask, number, fixed, clip, beta, tau, adv_clip, variant):
    return empty_flow_loss(logp, beta is not None, variant)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace, v, v_uncond, x, noise, seeds, guidance, rescale, published, storage, *step):
        take = getattr(torch.ops, namespace).flow_step.default
        x_next, logp = take(x, v, v_uncond, noise, seeds, list(step), guidance, rescale, published, storage)
        ctx.save_for_backward(x, v, v_uncond, x_next, None, None, *step)
        ctx.namespace, ctx.options = namespace, (guidance, rescale, published, False)
        ctx.mark_non_differentiable(x_next)
        ctx.set_materialize_grads(False)
        return x_next, logp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _, dlogp):
        return None, *_gradients(ctx, dlogp, None, None), *[None] * 11


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace, v, v_uncond, x, x_next, v_ref, v_old, guidance, rescale, published, flow_grpo_kl, *step):
        options = guidance, rescale, published, flow_grpo_kl
        score = getattr(torch.ops, namespace).flow_logp.default
        logp, kl, drift = score(x, v, v_uncond, x_next, v_ref, v_old, list(step), *options)
        ctx.save_for_backward(x, v, v_uncond, x_next, v_ref, v_old, *step)
        ctx.namespace, ctx.options = namespace, options
        ctx.set_materialize_grads(False)
        return logp, None if v_ref is None else kl, None if v_old is None else drift

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, dkl, ddrift):
        return None, *_gradients(ctx, dlogp, dkl, ddrift), *[None] * 12


def _gradients(ctx, *upstream: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if all(up is None for up in upstream):
        return None, None
    v_uncond = ctx.saved_tensors[2]
    gradient = getattr(torch.ops, ctx.namespace).flow_logp_gradient.default
    dv, dv_uncond = gradient(*ctx.saved_tensors[:6], list(ctx.saved_tensors[6:]), *upstream, *ctx.options)
    return dv, None if v_uncond is None else dv_uncond


def flow_step_by(
    namespace: str,
    x: Tensor,
    v: Tensor,
    guide: Guidance,
    step: FlowCoefficients,
    noise: Tensor | None,
    seeds: Tensor | None,
    published: bool,
    storage: torch.dtype,
) -> FlowStep:
    """As flow_step.flow_step_reference."""
    x, noise = (None if t is None else t.detach() for t in (x, noise))
    return FlowStep(*_Step.apply(namespace, v, guide.v_uncond, x, noise, seeds, *_guidance(guide), published, storage, *step))


def flow_logp_by(
    namespace: str,
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
    """As flow_step.flow_logp_reference."""
    x, x_next, v_ref, v_old = (t if t is None or not t.requires_grad else t.detach() for t in (x, x_next, v_ref, v_old))
    options = *_guidance(guide), published, flow_grpo_kl
    if namespace == "aot_fast_cpu":  # whose autograd is in C++ too: a third of the call's time at 4,096 elements
        scores = torch.ops.aot_fast_cpu.scored_step.default(x, v, guide.v_uncond, x_next, v_ref, v_old, list(step), *options)
        return FlowLogProb(scores[0], None if v_ref is None else scores[1], None if v_old is None else scores[2])
    return FlowLogProb(*_Score.apply(namespace, v, guide.v_uncond, x, x_next, v_ref, v_old, *options, *step))


def _guidance(guide: Guidance) -> tuple[float, bool]:
    return float(guide.scale), guide.rescale and guide.v_uncond is not None


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace: str, v: Tensor, v_uncond: Tensor, guidance: float, rescale: bool) -> Tensor:
        ctx.save_for_backward(v, v_uncond)
        ctx.namespace, ctx.options = namespace, (guidance, rescale)
        return getattr(torch.ops, namespace).guided_velocity.default(v, v_uncond, guidance, rescale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        backward = getattr(torch.ops, ctx.namespace).guided_velocity_gradient.default
        return None, *backward(*ctx.saved_tensors, gradient, *ctx.options), None, None


def guided_velocity_by(namespace: str, v: Tensor, v_uncond: Tensor, guidance: float, rescale: bool) -> Tensor:
    """As guidance.guided_velocity_reference."""
    return _Guided.apply(namespace, v, v_uncond, float(guidance), rescale)


def _row(t: Tensor | None) -> Tensor | None:
    """Samples, or a number, as the operator reads them: contiguous, without a graph, not in fp64."""
    if t is None:
        return None
    t = t.detach() if t.requires_grad else t
    return (t.float() if t.dtype == torch.float64 else t).contiguous()


def flow_policy_loss_by(
    namespace: str,
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
    """As flow_policy_loss.flow_policy_loss_reference."""
    number = count.to(logp.device, non_blocking=True) if isinstance(count, Tensor) else None
    fixed = None if count is None or number is not None else float(count)
    fields = *(_row(t) for t in (logp, old, advantages, kl, drift)), std, dt, _row(mask), _row(number)
    clip, beta = 0.0 if s.clip is None else float(s.clip), float(s.beta) if s.beta > 0 else None
    operator = getattr(torch.ops, namespace).flow_policy_loss.default
    results, dlogp, dkl, ddrift = operator(*fields, fixed, clip, beta, float(s.tau), float(s.adv_clip), s.variant)
    known = dlogp, None if beta is None else dkl, ddrift if s.variant == "guard" else None
    absent = {"loss", "unused", *(("count/clip_low", "count/clip_high") if s.variant == "dppo" else ("count/dropped",))}
    absent |= {name for name, t in (("sum/kl", kl), ("sum/drift", drift)) if t is None}
    values = dict(zip(RESULTS, results.unbind()))
    loss = attach_gradients(values["loss"], (logp, kl, drift), known)
    return PolicyLoss(loss, {name: value for name, value in values.items() if name not in absent})
