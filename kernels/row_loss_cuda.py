"""csrc/cuda: statistics, loss gradient and dlogits of each row with one read and one write of the logits (sm_90, a cluster holds the row).

Nothing calls it yet: linear_policy_loss takes it once it is measured ahead of Triton's two passes. Not for gspo, whose ratio needs a
sequence's log-probs first.
"""

import functools
import importlib.util

import torch
from torch import Tensor

from .policy_loss import PolicySettings, TokenBatch


@functools.cache
def problem() -> str | None:
    """Loads the library once; why it cannot be used, or None."""
    found = importlib.util.find_spec(f"{__package__}._cuda")
    if found is None:
        return "csrc/cuda is not built (it takes a torch with CUDA, and nvcc)"
    try:
        torch.ops.load_library(found.origin)
    except OSError as error:
        return f"{found.origin} does not load, was it built for another torch? ({error})"
    return None


def fits(logits: Tensor) -> bool:
    """Whether row_loss takes these logits: rows of a multiple of 8 columns, 16-byte aligned, on a device of compute capability 9."""
    return problem() is None and logits.is_cuda and torch.ops.aot_fast_cuda.fits(logits)


def row_loss(
    logits: Tensor, targets: Tensor, batch: TokenBatch, settings: PolicySettings, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, valid, [N] each, and dL/dlogits [N, V] in `dtype` (bf16, or fp32 for fp32 logits) in the logits' own memory.

    logits: [N, V] fp32 or bf16 that `fits` takes. batch: the rows' tokens, in fp32, with the weights of the loss; rows under a False mask
    have weight 0. Raises RuntimeError on anything else.
    """
    s = settings
    weight = torch.where(batch.mask, batch.weight, 0)
    dual_clip = s.dual_clip if s.loss == "ppo" else None
    numbers = temperature, s.loss, s.kl, 1.0 - s.clip_low, 1.0 + s.clip_high, dual_clip, s.beta, s.entropy_coef
    tokens = batch.advantages, batch.old_logp, batch.ref_logp, weight
    logp, entropy, valid = torch.ops.aot_fast_cuda.row_loss(logits, targets.long().contiguous(), *tokens, *numbers, dtype)
    return logp, entropy, valid, logits.view(dtype)[:, : logits.shape[1]]
