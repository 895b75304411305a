"""Log-probability and entropy straight from hidden states, a chunk of rows at a time: the logits never exist whole.

    logits = hidden @ weight^T;   then as logprob.   dhidden = dlogits @ weight,   dweight = dlogits^T @ hidden

N rows, H hidden, V vocabulary. Floor: one GEMM of 2 N H V operations forward; backward recomputes the logits, so training through this
operator is four GEMMs (linear_policy_loss needs three). Memory: one chunk, chunk_rows x V.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import FLOATS, INTEGERS, compute_dtype, require, require_tensor
from .dispatch import implementation
from .gemm import add_product, gemm_operand, product
from .logprob import LogProb, RowStats, consumed_gradient, row_stats


@dataclass(frozen=True)
class HeadSettings:
    """The settings of the head."""

    temperature: float
    chunk_rows: int
    logits_dtype: torch.dtype


class RowPasses(NamedTuple):
    """A backend's passes over a chunk of logits."""

    row_stats: Callable
    """As logprob.row_stats."""
    logit_gradient: Callable
    """As logprob.consumed_gradient."""


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_rows: int = 4096,
    logits_dtype: torch.dtype = torch.float32,
) -> LogProb:
    """logprob(hidden @ weight.T, targets), differentiable in hidden and weight, in chunks of at most chunk_rows rows.

    hidden: [N, H], weight: [V, H], same float dtype, any strides. targets, temperature, validity: as logprob. logits_dtype: what the
    chunk's logits are rounded to (torch.float32, or bf16 with log-prob errors of about 0.03); fp64 inputs stay fp64. The weight's gradient
    is summed over the chunks in fp32. Raises ValueError on a wrong shape, dtype, temperature or chunk_rows < 1.
    """
    check_head(hidden, weight, targets, temperature, chunk_rows, logits_dtype)
    return implementation("linear_logprob", hidden)(hidden, weight, targets, temperature, chunk_rows, logits_dtype)


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_rows: int, logits_dtype: torch.dtype) -> None:
    """Checks what linear_logprob and linear_policy_loss have in common."""
    require_tensor("hidden", hidden, (None, None), FLOATS)
    require_tensor("weight", weight, (None, hidden.shape[1]), (hidden.dtype,), like=hidden)
    require_tensor("targets", targets, (hidden.shape[0],), INTEGERS, like=hidden)
    require(temperature > 0, "temperature", temperature, "more than 0")
    require(chunk_rows >= 1, "chunk_rows", chunk_rows, "at least 1")
    require(logits_dtype in FLOATS, "logits_dtype", logits_dtype, f"one of {FLOATS}")


def linear_logprob_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_rows: int, logits_dtype: torch.dtype
) -> LogProb:
    return chunked_logprob(
        hidden, weight, targets, HeadSettings(temperature, chunk_rows, logits_dtype), RowPasses(row_stats, consumed_gradient)
    )


def chunked_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, head: HeadSettings, passes: RowPasses) -> LogProb:
    """linear_logprob with a backend's passes over the rows of a chunk of logits."""
    return LogProb(*_LinearLogProb.apply(hidden, weight, targets, head, passes))


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, head: HeadSettings, passes: RowPasses):
        matrix = gemm_operand(weight)
        chunks = [
            passes.row_stats(chunk_logits(h, matrix, head.logits_dtype), t, head.temperature)
            for h, t in zip(hidden.split(head.chunk_rows), targets.split(head.chunk_rows))
        ]
        stats = RowStats(*(torch.cat(parts) for parts in zip(*chunks)))
        ctx.save_for_backward(hidden, weight, targets, *stats)
        ctx.settings = head, passes
        ctx.mark_non_differentiable(stats.valid)
        ctx.set_materialize_grads(False)
        return stats.logp, stats.entropy, stats.valid

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp: Tensor | None, dentropy: Tensor | None, _):
        hidden, weight, targets, *stats = ctx.saved_tensors
        head, passes = ctx.settings
        zeros = torch.zeros_like(stats[0])
        dlogp, dentropy = (zeros if g is None else g for g in (dlogp, dentropy))
        matrix = gemm_operand(weight)
        gradients = HeadGradients(hidden, matrix, *ctx.needs_input_grad[:2])
        for start in range(0, len(hidden), head.chunk_rows):
            rows = slice(start, start + head.chunk_rows)
            part = RowStats(*(s[rows] for s in stats))
            # A row without upstream gradient may hold anything; 0 * NaN would reach dweight through the GEMM.
            live = (part.valid & ((dlogp[rows] != 0) | (dentropy[rows] != 0))).unsqueeze(1)
            h = torch.where(live, hidden[rows], 0)
            logits = dlogits = None  # the last chunk's go before the next one's come
            logits = chunk_logits(h, matrix, head.logits_dtype)
            dlogits = passes.logit_gradient(logits, targets[rows], part, dlogp[rows], dentropy[rows], head.temperature, hidden.dtype)
            gradients.add(rows, h, dlogits)
        return gradients.dhidden, gradients.dweight_as(weight.dtype), None, None, None


def chunk_logits(hidden: Tensor, matrix: Tensor, logits_dtype: torch.dtype) -> Tensor:
    """Logits of a chunk, summed in fp32 (fp64) and kept so, or rounded to logits_dtype if that is a half type."""
    return product(hidden, matrix.T, logits_dtype if logits_dtype.itemsize < 4 and hidden.dtype != torch.float64 else compute_dtype(hidden))


class HeadGradients:
    """Sums dhidden and dweight over chunks; dweight in fp32 (fp64 for fp64 inputs), in chunk order."""

    def __init__(self, hidden: Tensor, matrix: Tensor, needs_hidden: bool, needs_weight: bool):
        self.matrix, self.needs_weight = matrix, needs_weight
        self.dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if needs_hidden else None
        self._dweight: Tensor | None = None

    def add(self, rows: Tensor | slice, hidden: Tensor, dlogits: Tensor) -> None:
        """rows: which rows of dhidden these are; hidden [n, H]; dlogits [n, V] in hidden's dtype."""
        if self.dhidden is not None:
            self.dhidden[rows] = product(dlogits, self.matrix, self.dhidden.dtype)
        if self.needs_weight and self._dweight is None:  # written, not added to zeros: 2 GB less to write and to read at 152,064 x 3,584
            self._dweight = product(dlogits.T, hidden, compute_dtype(self.matrix))
        elif self.needs_weight:
            add_product(self._dweight, dlogits.T, hidden)

    @property
    def dweight(self) -> Tensor | None:
        """fp32 (fp64); None where the weight needs none."""
        if self.needs_weight and self._dweight is None:
            self._dweight = torch.zeros(self.matrix.shape, dtype=compute_dtype(self.matrix), device=self.matrix.device)
        return self._dweight

    def dweight_as(self, dtype: torch.dtype) -> Tensor | None:
        """dweight in the weight's dtype, or None."""
        return None if self.dweight is None else self.dweight.to(dtype)
