"""The operators in C++ for the CPU (csrc/cpu): finds and loads their library, and wraps it as the other backends are.

They have the schemas of the Triton operators, under torch.ops.aot_fast_cpu, and the same autograd functions around them. Everything is
computed in fp32 and summed in fp64, in an order that depends on no thread count; each row or sample has the same bits alone and in a batch.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

from .flow_operators import (
    fake_flow_loss,
    fake_logp,
    fake_logp_gradient,
    fake_step,
    fake_velocity,
    fake_velocity_gradient,
    flow_logp_by,
    flow_policy_loss_by,
    flow_step_by,
    guided_velocity_by,
)
from .flow_step import FlowLogProb, FlowStep
from .group_advantage import Advantage
from .linear_logprob import HeadSettings, RowPasses, chunked_logprob
from .linear_policy_loss import HeadPasses, chunked_policy_loss
from .logprob import LogProb, RowStats, differentiable_logprob
from .logprob_operators import empty_stats, fake_in_place, fake_logit_gradient
from .metrics import PolicyLoss
from .policy_operators import empty_advantage, fake_backward, fake_forward, loss_and_gradients_by, policy_loss_by

NAMESPACE = "aot_fast_cpu"
FAKES = {
    "row_stats": empty_stats,
    "logit_gradient": fake_logit_gradient,
    "logit_gradient_in_place": fake_in_place,
    "group_advantage": empty_advantage,
    "policy_loss_forward": fake_forward,
    "policy_loss_backward": fake_backward,
    "flow_step": fake_step,
    "flow_logp": fake_logp,
    "flow_logp_gradient": fake_logp_gradient,
    "guided_velocity": fake_velocity,
    "guided_velocity_gradient": fake_velocity_gradient,
    "flow_policy_loss": fake_flow_loss,
}


@functools.cache
def problem() -> str | None:
    """Loads the library once; why it cannot be used, or None. AOT_FAST_CSRC_LIBRARY names another file, a sanitized build say."""
    found = importlib.util.find_spec(f"{__package__}._cpu")
    file = os.environ.get("AOT_FAST_CSRC_LIBRARY") or (found and found.origin)
    if not file:
        return "csrc/cpu is not built (`python setup.py build_ext --inplace` says why)"
    try:
        torch.ops.load_library(file)
    except OSError as error:
        return f"{file} does not load, was it built for another torch? ({error})"
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    return None


def description() -> str:
    """What runs on a CPU: the instruction set, or why it is plain torch."""
    return f"plain torch: {problem()}" if problem() else f"C++ ({torch.ops.aot_fast_cpu.isa()})"


def row_stats(logits: Tensor, targets: Tensor, temperature: float) -> RowStats:
    """As logprob.row_stats."""
    return RowStats(*torch.ops.aot_fast_cpu.row_stats.default(logits, targets, temperature))


def logit_gradient(
    logits: Tensor, targets: Tensor, stats: RowStats, dlogp: Tensor | None, dentropy: Tensor | None, temperature: float, dtype: torch.dtype
) -> Tensor:
    """As logprob.logit_gradient."""
    return torch.ops.aot_fast_cpu.logit_gradient.default(logits, targets, *stats, dlogp, dentropy, temperature, dtype)


def consumed_gradient(
    logits: Tensor, targets: Tensor, stats: RowStats, dlogp: Tensor, dentropy: Tensor | None, temperature: float, dtype: torch.dtype
) -> Tensor:
    """As logit_gradient, in the memory of the logits where their rows have room for it; the logits are gone afterwards."""
    if logits.stride(1) != 1 or dtype.itemsize > logits.dtype.itemsize:
        return logit_gradient(logits, targets, stats, dlogp, dentropy, temperature, dtype)
    torch.ops.aot_fast_cpu.logit_gradient_in_place.default(logits, targets, *stats, dlogp, dentropy, temperature, dtype)
    return logits.view(dtype)[:, : logits.shape[1]]


ROW_PASSES = RowPasses(row_stats, consumed_gradient)


def logprob_csrc(logits: Tensor, targets: Tensor, temperature: float) -> LogProb:
    """As logprob_reference."""
    return differentiable_logprob(logits, targets, temperature, row_stats, logit_gradient)


def linear_logprob_csrc(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_rows: int, logits_dtype: torch.dtype
) -> LogProb:
    """As linear_logprob_reference."""
    return chunked_logprob(hidden, weight, targets, HeadSettings(temperature, chunk_rows, logits_dtype), ROW_PASSES)


def linear_policy_loss_csrc(*arguments) -> PolicyLoss:
    """As linear_policy_loss_reference."""
    return chunked_policy_loss(*arguments, HeadPasses(ROW_PASSES, loss_and_gradients_csrc))


def loss_and_gradients_csrc(*arguments) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
    """As policy_loss.loss_and_gradients."""
    return loss_and_gradients_by(NAMESPACE, *arguments)


def group_advantage_csrc(rewards: Tensor, sizes: Tensor, eps: float, std: str, ddof: int) -> Advantage:
    """As group_advantage_reference."""
    return Advantage(*torch.ops.aot_fast_cpu.group_advantage.default(rewards, sizes, float(eps), std, ddof))


def policy_loss_csrc(*arguments) -> PolicyLoss:
    """As policy_loss_reference."""
    return policy_loss_by(NAMESPACE, *arguments)


def guided_velocity_csrc(*arguments) -> Tensor:
    """As guided_velocity_reference."""
    return guided_velocity_by(NAMESPACE, *arguments)


def flow_step_csrc(*arguments) -> FlowStep:
    """As flow_step_reference."""
    return flow_step_by(NAMESPACE, *arguments)


def flow_logp_csrc(*arguments) -> FlowLogProb:
    """As flow_logp_reference."""
    return flow_logp_by(NAMESPACE, *arguments)


def flow_policy_loss_csrc(*arguments) -> PolicyLoss:
    """As flow_policy_loss_reference."""
    return flow_policy_loss_by(NAMESPACE, *arguments)


if __name__ == "__main__":  # what an installation ends with
    print(f"aot_fast operators on a CPU: {description()}")
