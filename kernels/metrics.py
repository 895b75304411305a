"""Metrics of a loss: 0-d fp32 device tensors, named so that they combine without knowing what they are.

The prefix says how values of two micro-batches or ranks combine: `sum/` and `count/` are added, `max/` takes the larger. A mean is a sum
over the right count, formed once at the logging interval: ratio = sum/ratio / count/tokens. Nothing here synchronises with the host.

    count/tokens            unmasked, valid tokens                count/masked, count/invalid       tokens left out, and why
    sum/ratio               r = pi / pi_old                       max/ratio_deviation               max |r - 1|
    count/clip_low          A < 0 and r < 1 - clip_low            count/clip_high                   A > 0 and r > 1 + clip_high
    count/clip_dual         A < 0 and r > dual_clip               count/zero_coefficient            dL/dlogp exactly 0
    sum/kl_k1, sum/kl_k3    KL(old || new) as -d and e^d - 1 - d   sum/kl_ref                        the KL that beta multiplies
    sum/advantage, sum/advantage_squared                          sum/entropy                       where logits exist
    max/logp_mismatch       max |logp - old| where on_policy

flow_policy_loss counts samples instead (`count/samples`), and adds `sum/kl`, `sum/drift` and `count/dropped` (dppo).
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class PolicyLoss(NamedTuple):
    """A loss and what was measured in the same pass."""

    loss: Tensor
    """0-d, fp32 (fp64 for fp64 inputs); the gradient is already divided by the global normaliser."""
    metrics: dict[str, Tensor]
    """0-d fp32 tensors without a graph; the names are in the module docstring."""


def combine_metrics(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Combines the metrics of micro-batches (or of ranks) by their prefixes. A name that one part lacks is left as the others have it.

    Raises ValueError on a name whose prefix is not sum/, count/ or max/.
    """
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            how = name.split("/")[0]
            if how not in ("sum", "count", "max"):
                raise ValueError(f"metrics: given {name!r}, expected a name that starts with sum/, count/ or max/")
            if name in total:
                value = torch.maximum(total[name], value) if how == "max" else total[name] + value
            total[name] = value
    return total


def masked_max(values: Tensor, mask: Tensor) -> Tensor:
    """max over the mask; 0 where nothing is left (the values are not negative)."""
    selected = torch.where(mask, values, 0)
    return torch.cat([selected.flatten(), selected.new_zeros(1)]).amax()


def finish_metrics(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached fp32 scalars."""
    return {name: value.detach().to(torch.float32) for name, value in metrics.items()}
