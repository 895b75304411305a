"""Group-relative advantages (MATH section 1: GRPO, DAPO, Dr. GRPO, flow_grpo).

    A[i, j] = (R[i, j] - mean_j R[i, :]) / (std + eps)

P prompts, G_i samples of prompt i, R = sum of G_i. Bytes: 4 read and 4 written a reward; a launch is the floor.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import require, require_choice, require_tensor
from .dispatch import implementation


class Advantage(NamedTuple):
    """Advantages and which groups carry no signal."""

    values: Tensor
    """[R] fp32, exactly 0 in degenerate groups and where the reward is not finite."""
    degenerate: Tensor
    """[P] bool: fewer than two finite rewards, or all finite rewards equal."""
    num_nonfinite: Tensor
    """0-d int64: rewards left out because they are NaN or infinite."""


def group_advantage(
    rewards: Tensor, group_sizes: Tensor | Sequence[int], *, eps: float = 1e-6, std: str = "group", ddof: int = 1
) -> Advantage:
    """Advantage of each sample over its group; groups lie one after the other and may differ in size.

    rewards: [R] fp32 (or fp64). group_sizes: [P] int64 on the rewards' device, or a list; a group of one gets 0. eps >= 0 is added to the
    standard deviation. std: "group"; "batch", over all rewards given (the caller gathers them from all ranks); "none" (1, without eps).
    ddof: 0 or 1.
    Zero variance is found exactly, by max == min. Non-finite rewards leave mean and standard deviation, get 0 and are counted.
    No gradient. Raises ValueError on a wrong shape, dtype, choice or (list or CPU tensor) sizes that do not add up to R.
    """
    require_tensor("rewards", rewards, (None,), (torch.float32, torch.float64))
    require_choice("std", std, ("group", "batch", "none"))
    require(ddof in (0, 1), "ddof", ddof, "0 or 1")
    require(eps >= 0, "eps", eps, "at least 0")
    sizes = group_sizes if isinstance(group_sizes, Tensor) else torch.tensor(list(group_sizes), dtype=torch.int64)
    require_tensor("group_sizes", sizes, (None,), (torch.int64,))
    if sizes.device.type == "cpu" and not torch.compiler.is_compiling():
        require(
            bool(((sizes >= 0) & (sizes <= len(rewards))).all()) and int(sizes.sum()) == len(rewards),
            "group_sizes",
            sizes.tolist(),
            f"sizes that add up to {len(rewards)}",
        )
    with torch.no_grad():
        return implementation("group_advantage", rewards)(rewards, sizes.to(rewards.device, non_blocking=True), eps, std, ddof)


def group_advantage_reference(rewards: Tensor, sizes: Tensor, eps: float, std: str, ddof: int) -> Advantage:
    """In fp64: rewards of 1e4 + {0, 1} lose three digits of their difference in an fp32 two-pass."""
    num_groups = len(sizes)
    group = torch.repeat_interleave(torch.arange(num_groups, device=rewards.device), sizes, output_size=len(rewards))
    finite = torch.isfinite(rewards)
    values = torch.where(finite, rewards, 0).double()

    count = _group_sum(finite.double(), group, num_groups)
    highest = values.new_full((num_groups,), -torch.inf).scatter_reduce_(0, group, torch.where(finite, values, -torch.inf), "amax")
    lowest = values.new_full((num_groups,), torch.inf).scatter_reduce_(0, group, torch.where(finite, values, torch.inf), "amin")
    degenerate = (count < 2) | (highest == lowest)

    mean = _group_sum(values, group, num_groups) / count.clamp(min=1)
    centred = torch.where(finite, values - mean[group], 0)
    if std == "group":
        variance = _group_sum(centred.square(), group, num_groups) / (count - ddof).clamp(min=1)
        centred = centred / (variance.sqrt()[group] + eps)
    elif std == "batch":
        total = finite.sum()
        deviation = torch.where(finite, values - values.sum() / total.clamp(min=1), 0)
        variance = deviation.square().sum() / (total - ddof).clamp(min=1)
        centred = centred / (variance.sqrt() + eps)
    advantage = torch.where(finite & ~degenerate[group], centred, 0)
    return Advantage(advantage.float(), degenerate, (~finite).sum())


def _group_sum(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    return values.new_zeros(num_groups).index_add_(0, group, values)
