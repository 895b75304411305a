"""linear_logprob and linear_policy_loss on a GPU: the library's GEMMs around the Triton passes over each chunk of logits.

A chunk of the loss: GEMM into fp32 logits; row_stats (1 read); the loss of its rows; consumed_gradient (1 read, 1 write in the hidden
states' dtype, in the logits' own memory); GEMMs for dhidden and, summed in fp32, dweight. Against 2 N H V operations a GEMM the passes
move 4 + 4 + 2 B a logit.
"""

import torch
from torch import Tensor

from .linear_logprob import HeadSettings, RowPasses, chunked_logprob
from .linear_policy_loss import HeadPasses, chunked_policy_loss
from .logprob import LogProb
from .logprob_triton import consumed_gradient, row_stats
from .metrics import PolicyLoss
from .policy_loss_triton import loss_and_gradients_triton

ROW_PASSES = RowPasses(row_stats, consumed_gradient)
HEAD_PASSES = HeadPasses(ROW_PASSES, loss_and_gradients_triton)


def linear_logprob_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_rows: int, logits_dtype: torch.dtype
) -> LogProb:
    return chunked_logprob(hidden, weight, targets, HeadSettings(temperature, chunk_rows, logits_dtype), ROW_PASSES)


def linear_policy_loss_triton(*arguments) -> PolicyLoss:
    """As linear_policy_loss_reference."""
    return chunked_policy_loss(*arguments, HEAD_PASSES)
