"""Log-probability of given tokens and entropy of the distribution, from logits.

    z = logits / temperature,  m = max_j z_j,  S = sum_j e^(z_j - m)
    logp = z_t - m - ln S;  entropy = ln S - sum_j e^(z_j - m) (z_j - m) / S
    d logp / d z_j = [j = t] - p_j;   d entropy / d z_j = -p_j (ln p_j + entropy)

N rows (tokens), V vocabulary. Floor: the forward pass reads the logits once (N V elements), forward and backward read them twice and write
the gradient once. Reductions over V are in a fixed order, so that a row's result has the same bits alone, in a batch or permuted.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import FLOATS, INTEGERS, compute_dtype, require, require_tensor
from .dispatch import implementation
from .fixed_order import fixed_order_sum

CPU_BLOCK, DEVICE_BLOCK = 1 << 19, 1 << 22
"""Logits handled at a time, so that temporaries stay small beside the logits whatever N is. On a CPU they stay in the cache besides: blocks
of 16 MB took 3.8 times as long as blocks of 2 MB (512 x 32,000), most of it for memory pages."""

LOWEST = -1000.0
"""Where e^z is 0 even in fp64: the bound that keeps 0 * -inf out of the entropy, without changing a bit of it."""


class LogProb(NamedTuple):
    """Log-probabilities of the targets, [N] each."""

    logp: Tensor
    """fp32 (fp64 for fp64 logits), 0 where not valid."""
    entropy: Tensor
    """of the whole distribution in nats; same dtype; 0 where not valid."""
    valid: Tensor
    """bool: the target is in [0, V) and its logit is not -inf."""


class RowStats(NamedTuple):
    """What the gradient needs of each row, [N] each."""

    logp: Tensor
    entropy: Tensor
    valid: Tensor
    highest: Tensor
    """The largest logit, before the temperature; 0 for a row of -inf."""
    log_sum: Tensor
    """ln S."""


def logprob(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> LogProb:
    """log softmax(logits / temperature)[target] and the entropy, differentiable in the logits.

    logits: [N, V] fp32, bf16, fp16 or fp64, any strides; -inf is allowed. targets: [N] int64 or int32; outside [0, V) (-100 included) the
    row is not valid and is never dereferenced. temperature > 0. Where `valid` is False, logp = entropy = 0 and the gradient is 0. A row
    without upstream gradient gets exactly 0, whatever its logits are (NaN included). The gradient has the logits' dtype.
    Raises ValueError on a wrong shape, dtype or temperature.
    """
    require_tensor("logits", logits, (None, None), FLOATS)
    require_tensor("targets", targets, (logits.shape[0],), INTEGERS, like=logits)
    require(temperature > 0, "temperature", temperature, "more than 0")
    return implementation("logprob", logits)(logits, targets, temperature)


def logprob_reference(logits: Tensor, targets: Tensor, temperature: float) -> LogProb:
    return differentiable_logprob(logits, targets, temperature, row_stats, logit_gradient)


def differentiable_logprob(logits: Tensor, targets: Tensor, temperature: float, forward: Callable, backward: Callable) -> LogProb:
    """logprob with its gradient, from the two passes of a backend: `row_stats` and `logit_gradient` below or their likes."""
    return LogProb(*_LogProb.apply(logits, targets, temperature, forward, backward))


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temperature: float, forward: Callable, backward: Callable):
        stats = forward(logits, targets, temperature)
        ctx.save_for_backward(logits, targets, *stats)
        ctx.temperature, ctx.gradient = temperature, backward
        ctx.mark_non_differentiable(stats.valid)
        ctx.set_materialize_grads(False)
        return stats.logp, stats.entropy, stats.valid

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp: Tensor | None, dentropy: Tensor | None, _):
        logits, targets, *stats = ctx.saved_tensors
        gradient = ctx.gradient(logits, targets, RowStats(*stats), dlogp, dentropy, ctx.temperature, logits.dtype)
        return gradient, None, None, None, None


def row_stats(logits: Tensor, targets: Tensor, temperature: float) -> RowStats:
    """RowStats of logits [N, V] for targets [N], a block of rows at a time."""
    blocks = [_row_stats(z, t, temperature) for z, t in zip(logits.split(_block_rows(logits)), targets.split(_block_rows(logits)))]
    return RowStats(*(torch.cat(parts) for parts in zip(*blocks)))


def _row_stats(logits: Tensor, targets: Tensor, temperature: float) -> RowStats:
    in_range = (targets >= 0) & (targets < logits.shape[1])
    target = torch.where(in_range, targets, 0).long().unsqueeze(1)
    highest = logits.amax(dim=1).to(compute_dtype(logits))
    highest = torch.where(highest == -torch.inf, 0, highest)  # -inf - -inf is NaN
    z = _centred(logits, highest, temperature)
    weights = torch.exp(z)
    total = fixed_order_sum(weights)
    log_sum = torch.log(total)
    spread = fixed_order_sum(weights * z.clamp(min=LOWEST)) / total
    target_z = z.gather(1, target).squeeze(1)
    valid = in_range & (target_z != -torch.inf)
    logp = torch.where(valid, target_z - log_sum, 0)
    entropy = torch.where(valid, log_sum - spread, 0)
    return RowStats(logp.to(z.dtype), entropy.to(z.dtype), valid, highest, log_sum.to(z.dtype))


def logit_gradient(
    logits: Tensor,
    targets: Tensor,
    stats: RowStats,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """dL/dlogits [N, V] in `dtype` from dL/dlogp and dL/dentropy, [N] each or None; zero in rows that are not valid.

    out: where to write it, the logits themselves included.
    """
    zeros = torch.zeros_like(stats.logp)
    dlogp = zeros if dlogp is None else torch.where(stats.valid, dlogp, 0)
    with_entropy = dentropy is not None
    dentropy = torch.where(stats.valid, dentropy, 0) if with_entropy else zeros
    gradient = torch.empty(logits.shape, dtype=dtype, device=logits.device) if out is None else out
    size = _block_rows(logits)
    for block, z, t, *rows in zip(*(x.split(size) for x in (gradient, logits, targets, *stats, dlogp, dentropy))):
        block.copy_(_logit_gradient(z, t, RowStats(*rows[:5]), rows[5], rows[6] if with_entropy else None, temperature))
    return gradient


def consumed_gradient(
    logits: Tensor, targets: Tensor, stats: RowStats, dlogp: Tensor | None, dentropy: Tensor | None, temperature: float, dtype: torch.dtype
) -> Tensor:
    """logit_gradient in the memory of the logits, which are gone then, where the dtypes agree."""
    out = logits if logits.dtype == dtype else None
    return logit_gradient(logits, targets, stats, dlogp, dentropy, temperature, dtype, out)


def _logit_gradient(logits: Tensor, targets: Tensor, stats: RowStats, dlogp: Tensor, dentropy: Tensor | None, temperature: float) -> Tensor:
    log_p = _centred(logits, stats.highest, temperature) - stats.log_sum.unsqueeze(1)
    p = torch.exp(log_p)
    gradient = -dlogp.unsqueeze(1) * p
    # 1 - p of the target as -expm1(log p): p rounded before the subtraction loses the whole gradient of a likely token.
    target = torch.where(stats.valid, targets, 0).long().unsqueeze(1)
    gradient.scatter_(1, target, (dlogp * -torch.expm1(stats.logp)).unsqueeze(1))
    live = dlogp != 0
    if dentropy is not None:
        gradient -= dentropy.unsqueeze(1) * p * (log_p.clamp(min=LOWEST) + stats.entropy.unsqueeze(1))
        live |= dentropy != 0
    # The row of a masked token may be NaN, and 0 times NaN is not 0.
    return torch.where(live.unsqueeze(1), gradient if temperature == 1.0 else gradient / temperature, 0)


def _centred(logits: Tensor, highest: Tensor, temperature: float) -> Tensor:
    """z - m. Subtracted before the division: logits of 120 divided by 0.7 first are off by 1e-5."""
    z = logits.to(highest.dtype) - highest.unsqueeze(1)
    return z if temperature == 1.0 else z / temperature


def _block_rows(logits: Tensor) -> int:
    block = CPU_BLOCK if logits.device.type == "cpu" else DEVICE_BLOCK
    return max(1, block // max(1, logits.shape[1]))
