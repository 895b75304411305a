"""policy_loss and group_advantage on registered operators: what the Triton and the C++ operators of one schema have in common.

`namespace` says whose operators run: torch.ops.aot_fast (Triton) or torch.ops.aot_fast_cpu (csrc).
"""

import itertools

import torch
from torch import Tensor

from .metrics import PolicyLoss
from .policy_loss import Normaliser, PolicySettings, TokenBatch

ROWS = (
    "loss count/tokens sum/ratio count/clip_low count/clip_high count/clip_dual sum/kl_k1 sum/kl_k3 sum/advantage sum/advantage_squared "
    "count/zero_coefficient count/masked count/invalid sum/kl_ref sum/entropy sequences max/ratio_deviation"
).split()
"""What policy_loss_forward sums over the tokens, in its order; the last one is a maximum."""


def empty_forward(logp: Tensor, entropy: Tensor | None, entropy_coef: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of policy_loss_forward, not yet written: loss, gradient, bonus, scale, ROWS."""
    n = logp.shape[0]
    num_bonus = 0 if entropy is None or entropy_coef is None else n
    return tuple(logp.new_empty(shape, dtype=torch.float32) for shape in ((), (n,), (num_bonus,), (), (len(ROWS),)))


def empty_advantage(rewards: Tensor, sizes: Tensor, eps: float, std: str, ddof: int) -> tuple[Tensor, Tensor, Tensor]:
    """The results of group_advantage, not yet written: the fields of Advantage."""
    return torch.empty(rewards.shape[0], device=rewards.device), sizes.new_empty(sizes.shape[0], dtype=torch.bool), sizes.new_empty(())


def fake_forward(logp, entropy, *others):
    return empty_forward(logp, entropy, others[-1])


def fake_backward(gradient, bonus, scale, upstream, dtype, bonus_dtype):
    return torch.empty_like(gradient, dtype=dtype), torch.empty_like(bonus, dtype=bonus_dtype)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, namespace: str, logp: Tensor, entropy: Tensor | None, *arguments):
        forward = getattr(torch.ops, namespace).policy_loss_forward.default
        loss, gradient, bonus, scale, results = forward(_row(logp), _row(entropy), *arguments)
        ctx.save_for_backward(gradient, bonus, scale)
        ctx.namespace, ctx.dtypes = namespace, (logp.dtype, logp.dtype if entropy is None else entropy.dtype)
        ctx.with_bonus, ctx.num_arguments = bool(len(bonus)), len(arguments)
        ctx.mark_non_differentiable(results)
        ctx.set_materialize_grads(False)  # zeros for the results would be a launch
        return loss, results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor, _):
        backward = getattr(torch.ops, ctx.namespace).policy_loss_backward.default
        dlogp, dentropy = backward(*ctx.saved_tensors, upstream, *ctx.dtypes)
        return None, dlogp, dentropy if ctx.with_bonus else None, *([None] * ctx.num_arguments)


def _row(t: Tensor | None) -> Tensor | None:
    """Tokens, or a number, as the operators read them: contiguous, without a graph, not in fp64."""
    if t is None:
        return None
    t = t.detach() if t.requires_grad else t
    return (t.float() if t.dtype == torch.float64 else t).contiguous()


def _whole(t: Tensor | None) -> Tensor | None:
    """As `_row`, with its graph."""
    return None if t is None else (t.float() if t.dtype == torch.float64 else t).contiguous()


def _arguments(s: PolicySettings, fields: tuple[Tensor | None, ...], normaliser: Normaliser, divisor: float) -> tuple:
    """What policy_loss_forward takes after logp and entropy; fields: advantages to weight."""
    number = fixed = None
    if isinstance(normaliser, Tensor):
        number = normaliser.to(fields[0].device, non_blocking=True)
    elif normaliser is not None:
        fixed = float(normaliser)
    options = s.loss, s.kl, s.agg, 1.0 - s.clip_low, 1.0 + s.clip_high, s.dual_clip if s.loss == "ppo" else None
    return *(_row(t) for t in (*fields, number)), fixed, divisor, *options, s.beta or None, s.entropy_coef or None


def policy_loss_by(
    namespace: str,
    logp: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    mask: Tensor | None,
    valid: Tensor | None,
    seq_ids: Tensor | None,
    settings: PolicySettings,
) -> PolicyLoss:
    """As policy_loss.policy_loss_reference."""
    if entropy is not None and entropy.dtype == torch.float64:
        entropy = entropy.float()
    normaliser = settings.num_tokens if settings.agg == "token" else settings.num_sequences
    divisor = float(settings.max_length) if settings.agg == "seq_sum_norm" else 1.0
    arguments = _arguments(settings, (advantages, old, ref, mask, valid, seq_ids, None), normaliser, divisor)
    if namespace == "aot_fast_cpu":  # whose autograd is in C++ too: a third of the call's time at 4,096 tokens
        loss, results = torch.ops.aot_fast_cpu.policy_loss.default(_whole(logp), _whole(entropy), *arguments)
    else:
        loss, results = _PolicyLoss.apply(namespace, logp, entropy, *arguments)
    return PolicyLoss(loss, _metrics(results, ref is not None, entropy is not None, left_out=True))


def loss_and_gradients_by(
    namespace: str, logp: Tensor, entropy: Tensor | None, batch: TokenBatch, s: PolicySettings
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
    """As policy_loss.loss_and_gradients, with the weights of the batch. Nothing is read on the host."""
    fields = batch.advantages, batch.old_logp, batch.ref_logp, batch.mask, None, batch.sequence, batch.weight
    forward = getattr(torch.ops, namespace).policy_loss_forward.default
    loss, gradient, bonus, _, results = forward(_row(logp), _row(entropy), *_arguments(s, fields, 1.0, 1.0))
    dentropy = bonus if entropy is not None and s.entropy_coef != 0 else None
    return loss, gradient, dentropy, _metrics(results, batch.ref_logp is not None, entropy is not None, left_out=False)


def _metrics(results: Tensor, with_ref: bool, with_entropy: bool, left_out: bool) -> dict[str, Tensor]:
    values = results.unbind()
    return {name: values[k] for name, k in METRIC_ROWS[with_ref, with_entropy, left_out]}


def _metric_rows(with_ref: bool, with_entropy: bool, left_out: bool) -> list[tuple[str, int]]:
    """Names and rows of what is a metric: of ROWS those that need no input, or one that is there."""
    optional = {"count/masked": left_out, "count/invalid": left_out, "sum/kl_ref": with_ref, "sum/entropy": with_entropy}
    return [(name, k) for k, name in enumerate(ROWS) if "/" in name and optional.get(name, True)]


METRIC_ROWS = {given: _metric_rows(*given) for given in itertools.product((False, True), repeat=3)}
"""Formed once: it took 10 us of a call."""
