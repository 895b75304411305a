"""policy_loss in Triton: two launches forward and one backward, the equations of policy_loss.py.

Tokens      a block of tokens a program: loss terms without the normaliser, their gradient, and a column of partial sums.
Finish      one program adds the columns in order, forms the normaliser and writes loss and metrics.
Backward    gradient * normaliser * upstream scalar, out of place.
Sequences   before the others, for gspo and seq_mean: one program a token, which ends at once unless a sequence starts at the token; else
            it loops over the sequence: 1 / length, the mean log-ratio, and the gradient that the shared ratio sends to every token.

N tokens. Bytes: 4 to 21 read and 4 written a token, 8 more in the backward pass. Floor: a launch. No sum depends on the order in which
programs run.
"""

import torch
import triton
from torch import Tensor

from .ahead_of_time import Build
from .metrics import PolicyLoss
from .policy_kernels_triton import (
    BACKWARD,
    FINISH,
    ROWS,
    SEQUENCES,
    TOKENS,
    backward_kernel,
    finish_kernel,
    sequences_kernel,
    tokens_kernel,
)
from .policy_loss import Normaliser, PolicySettings, TokenBatch

OPTIONAL = {"count/masked", "count/invalid", "sum/kl_ref", "sum/entropy"}
"""Rows that are no metric where their input is absent."""


@torch.library.custom_op("aot_fast::policy_loss_forward", mutates_args=())
def _forward(
    logp: Tensor,
    entropy: Tensor | None,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    mask: Tensor | None,
    valid: Tensor | None,
    seq_ids: Tensor | None,
    weight: Tensor | None,
    number: Tensor | None,
    fixed: float | None,
    divisor: float,
    loss: str,
    kl: str,
    agg: str,
    ratio_low: float,
    ratio_high: float,
    dual_clip: float | None,
    beta: float | None,
    entropy_coef: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss; dL/dlogp and dL/dentropy, still to be multiplied by the normaliser; the normaliser 1 / count; ROWS."""
    outputs = _empty_forward(logp, entropy, entropy_coef)
    value, gradient, bonus, scale, results = outputs
    n = len(logp)
    num_blocks = triton.cdiv(n, TOKENS[0])
    partials = logp.new_empty(len(ROWS), num_blocks, dtype=torch.float32)
    log_ratio = shared = None
    if n and (loss == "gspo" or (agg == "seq_mean" and weight is None)):
        fields = logp, advantages, old, mask, valid, seq_ids
        weight, log_ratio, shared = _sequence_pass(fields, weight, loss == "gspo", agg == "seq_mean", ratio_low, ratio_high)
    if n:
        counted = seq_ids if agg != "token" and number is None and fixed is None else None
        fields = logp, entropy, advantages, old, ref, mask, valid, counted, weight, log_ratio, shared, gradient, bonus, partials
        numbers = n, num_blocks, ratio_low, ratio_high, dual_clip, beta, entropy_coef
        tokens_kernel[(num_blocks,)](*fields, *numbers, LOSS=loss, KL=kl, BLOCK=TOKENS[0], num_warps=TOKENS[1])
    fields = partials, number, value, scale, results
    finish_kernel[(1,)](*fields, num_blocks, fixed, divisor, AGG=agg, BLOCK=FINISH[0], num_warps=FINISH[1])
    return outputs


def _sequence_pass(
    fields: tuple[Tensor | None, ...], weight: Tensor | None, gspo: bool, seq_mean: bool, ratio_low: float, ratio_high: float
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weights, mean log-ratio and shared gradient of each token; None where not needed."""
    n = len(fields[0])
    mean_weight = fields[0].new_empty(n, dtype=torch.float32) if seq_mean and weight is None else None
    log_ratio, shared = (fields[0].new_empty(n, dtype=torch.float32) if gspo else None for _ in range(2))
    outputs = mean_weight, log_ratio, shared
    sequences_kernel[(n,)](*fields, weight, *outputs, n, ratio_low, ratio_high, BLOCK=SEQUENCES[0], num_warps=SEQUENCES[1])
    return mean_weight if weight is None else weight, log_ratio, shared


def _empty_forward(logp: Tensor, entropy: Tensor | None, entropy_coef: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = len(logp)
    num_bonus = 0 if entropy is None or entropy_coef is None else n
    return tuple(logp.new_empty(shape, dtype=torch.float32) for shape in ((), (n,), (num_bonus,), (), (len(ROWS),)))


@_forward.register_fake
def _(logp, entropy, *others):
    return _empty_forward(logp, entropy, others[-1])


@torch.library.custom_op("aot_fast::policy_loss_backward", mutates_args=())
def _backward(
    gradient: Tensor, bonus: Tensor, scale: Tensor, upstream: Tensor, dtype: torch.dtype, bonus_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    outputs = _empty_backward(gradient, bonus, scale, upstream, dtype, bonus_dtype)
    if len(gradient):
        fields = gradient, bonus, scale, upstream, outputs[0], outputs[1] if len(bonus) else None
        grid = (triton.cdiv(len(gradient), BACKWARD[0]),)
        backward_kernel[grid](*fields, len(gradient), BLOCK=BACKWARD[0], num_warps=BACKWARD[1])
    return outputs


@_backward.register_fake
def _empty_backward(gradient, bonus, scale, upstream, dtype, bonus_dtype):
    return torch.empty_like(gradient, dtype=dtype), torch.empty_like(bonus, dtype=bonus_dtype)


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp: Tensor, entropy: Tensor | None, *arguments):
        loss, gradient, bonus, scale, results = _forward(_row(logp), _row(entropy), *arguments)
        ctx.save_for_backward(gradient, bonus, scale)
        ctx.dtypes = logp.dtype, logp.dtype if entropy is None else entropy.dtype
        ctx.with_bonus, ctx.num_arguments = bool(len(bonus)), len(arguments)
        ctx.mark_non_differentiable(results)
        ctx.set_materialize_grads(False)  # zeros for the results would be a launch
        return loss, results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor, _):
        dlogp, dentropy = _backward(*ctx.saved_tensors, upstream, *ctx.dtypes)
        return dlogp, dentropy if ctx.with_bonus else None, *([None] * ctx.num_arguments)


def _row(t: Tensor | None) -> Tensor | None:
    """Tokens, or a number, as the kernels read them: contiguous, without a graph, not in fp64."""
    return None if t is None else t.detach().to(torch.float32 if t.dtype == torch.float64 else t.dtype).contiguous()


def _arguments(s: PolicySettings, fields: tuple[Tensor | None, ...], normaliser: Normaliser, divisor: float) -> tuple:
    """What _forward takes after logp and entropy; fields: advantages to weight."""
    number = fixed = None
    if isinstance(normaliser, Tensor):
        number = normaliser.to(fields[0].device, non_blocking=True)
    elif normaliser is not None:
        fixed = float(normaliser)
    options = s.loss, s.kl, s.agg, 1.0 - s.clip_low, 1.0 + s.clip_high, s.dual_clip if s.loss == "ppo" else None
    return *(_row(t) for t in (*fields, number)), fixed, divisor, *options, s.beta or None, s.entropy_coef or None


def policy_loss_triton(
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
    if entropy is not None and entropy.dtype == torch.float64:
        entropy = entropy.float()
    normaliser = settings.num_tokens if settings.agg == "token" else settings.num_sequences
    divisor = float(settings.max_length) if settings.agg == "seq_sum_norm" else 1.0
    arguments = _arguments(settings, (advantages, old, ref, mask, valid, seq_ids, None), normaliser, divisor)
    loss, results = _PolicyLoss.apply(logp, entropy, *arguments)
    return PolicyLoss(loss, _metrics(results, ref, entropy, {"count/masked", "count/invalid"}))


def loss_and_gradients_triton(
    logp: Tensor, entropy: Tensor | None, batch: TokenBatch, s: PolicySettings
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
    """As policy_loss.loss_and_gradients, with the weights of the batch. Nothing is read on the host."""
    fields = batch.advantages, batch.old_logp, batch.ref_logp, batch.mask, None, batch.sequence, batch.weight
    loss, gradient, bonus, _, results = _forward(_row(logp), _row(entropy), *_arguments(s, fields, 1.0, 1.0))
    dentropy = bonus if entropy is not None and s.entropy_coef != 0 else None
    return loss, gradient, dentropy, _metrics(results, batch.ref_logp, entropy, set())


def _metrics(results: Tensor, ref: Tensor | None, entropy: Tensor | None, more: set[str]) -> dict[str, Tensor]:
    names = set(more)
    if ref is not None:
        names.add("sum/kl_ref")
    if entropy is not None:
        names.add("sum/entropy")
    return {name: x for name, x in zip(ROWS, results.unbind()) if "/" in name and (name in names or name not in OPTIONAL)}


def builds() -> list[Build]:
    """What ships, for the gates: each loss with everything given, ppo also with as little as it takes."""
    every = dict.fromkeys(("entropy", "advantages", "old", "ref", "weight", "sequence_log_ratio", "sequence_gradient"), "*fp32")
    every |= dict.fromkeys(("sequence_weight", "log_ratio", "gradient", "bonus", "partials", "number", "loss", "scale", "results"), "*fp32")
    every |= dict.fromkeys(("ratio_low", "ratio_high", "dual_clip", "beta", "entropy_coef", "fixed", "divisor"), "fp32")
    every |= {
        "mask": "*i1",
        "valid": "*i1",
        "seq_ids": "*i64",
        "upstream": "*fp32",
        "dentropy": "*fp32",
        "num_tokens": "i32",
        "num_blocks": "i32",
    }
    shared = {"sequence_log_ratio", "sequence_gradient"}
    least = {"entropy", "ref", "valid", "seq_ids", "bonus", "beta", "entropy_coef"}
    made = []
    for dtype in ("bf16", "fp32"):
        kinds = every | {"logp": f"*{dtype}", "dlogp": f"*{dtype}"}
        cases = [
            (f"ppo {dtype}", tokens_kernel, TOKENS, {"LOSS": "ppo", "KL": "k3"}, shared | {"weight"}),
            (f"ppo {dtype} least", tokens_kernel, TOKENS, {"LOSS": "ppo", "KL": "k3"}, shared | {"weight"} | least),
            (f"cispo {dtype}", tokens_kernel, TOKENS, {"LOSS": "cispo", "KL": "k3"}, shared | {"weight", "dual_clip"}),
            (f"gspo {dtype}", tokens_kernel, TOKENS, {"LOSS": "gspo", "KL": "k3"}, {"dual_clip"}),
            (f"ppo {dtype} weighted", tokens_kernel, TOKENS, {"LOSS": "ppo", "KL": "k3"}, shared | {"valid", "seq_ids"}),
            (f"sequences {dtype}", sequences_kernel, SEQUENCES, {}, {"weight"}),
            (f"sequences {dtype} weighted", sequences_kernel, SEQUENCES, {}, {"sequence_weight", "valid"}),
            (f"backward {dtype}", backward_kernel, BACKWARD, {}, set()),
        ]
        if dtype == "fp32":
            cases.append(("finish", finish_kernel, FINISH, {"AGG": "token"}, {"number"}))
        for name, kernel, (block, num_warps), constants, absent in cases:
            arguments = {k: kind for k, kind in kinds.items() if k in kernel.arg_names and k not in absent}
            constants = constants | {"BLOCK": block} | {k: None for k in absent if k in kernel.arg_names}
            divisible = frozenset({"num_tokens"} & arguments.keys())
            wide = kernel in (tokens_kernel, backward_kernel)
            made.append(Build(f"policy_loss {name}", kernel, arguments, constants, num_warps, divisible=divisible, wide_loads=wide))
    return made
