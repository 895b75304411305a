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
    SEQUENCES,
    TOKENS,
    backward_kernel,
    finish_kernel,
    sequences_kernel,
    tokens_kernel,
)
from .policy_operators import ROWS, empty_forward, fake_backward, fake_forward, loss_and_gradients_by, policy_loss_by


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
    outputs = empty_forward(logp, entropy, entropy_coef)
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


_forward.register_fake(fake_forward)


@torch.library.custom_op("aot_fast::policy_loss_backward", mutates_args=())
def _backward(
    gradient: Tensor, bonus: Tensor, scale: Tensor, upstream: Tensor, dtype: torch.dtype, bonus_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    outputs = fake_backward(gradient, bonus, scale, upstream, dtype, bonus_dtype)
    if len(gradient):
        fields = gradient, bonus, scale, upstream, outputs[0], outputs[1] if len(bonus) else None
        grid = (triton.cdiv(len(gradient), BACKWARD[0]),)
        backward_kernel[grid](*fields, len(gradient), BLOCK=BACKWARD[0], num_warps=BACKWARD[1])
    return outputs


_backward.register_fake(fake_backward)


def policy_loss_triton(*arguments) -> PolicyLoss:
    """As policy_loss_reference."""
    return policy_loss_by("aot_fast", *arguments)


def loss_and_gradients_triton(*arguments) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
    """As policy_loss.loss_and_gradients."""
    return loss_and_gradients_by("aot_fast", *arguments)


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
