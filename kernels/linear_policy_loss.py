"""The policy loss straight from hidden states: the logits never exist whole, and three GEMMs instead of four.

    logits = hidden @ weight^T -> logp, entropy (logprob) -> L, dL/dlogp (policy_loss) -> dlogits -> dhidden, dweight

Everything that dL/dlogp depends on is known before the logits are (old, ref, advantages, the global normaliser), so that the gradient is
formed while a chunk's logits are there, and the backward pass only scales it. N rows (tokens), H hidden, V vocabulary.
Floor: 3 GEMMs of 2 N H V operations. Memory: one chunk of logits, its gradient in hidden's dtype, dweight in fp32, dhidden.

Rows whose coefficient is known to be zero (mask False; advantage exactly 0 when beta = entropy_coef = 0) never enter a backward GEMM,
masked rows no GEMM at all: rows are ordered [with gradient | metrics only], and one host read of the two counts splits them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import compute_dtype, require, require_tensor
from .dispatch import implementation
from .gemm import gemm_operand
from .known_gradient import attach_gradients
from .linear_logprob import HeadGradients, HeadSettings, RowPasses, check_head, chunk_logits
from .logprob import RowStats, consumed_gradient, row_stats
from .metrics import PolicyLoss, combine_metrics, finish_metrics
from .policy_loss import (
    Normaliser,
    PolicySettings,
    TokenBatch,
    check_policy,
    left_out,
    loss_and_gradients,
    sequence_sum,
    settled_old,
    token_batch,
)


class HeadPasses(NamedTuple):
    """A backend's passes over a chunk of logits and its rows."""

    rows: RowPasses
    loss_and_gradients: Callable
    """As policy_loss.loss_and_gradients."""


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    mask: Tensor | None = None,
    seq_ids: Tensor | None = None,
    loss: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 3.0,
    beta: float = 0.0,
    kl: str = "k3",
    agg: str = "token",
    num_tokens: Normaliser = None,
    num_sequences: Normaliser = None,
    max_length: float | None = None,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    chunk_rows: int = 4096,
    logits_dtype: torch.dtype = torch.float32,
    dweight_out: Tensor | None = None,
    on_policy: Tensor | None = None,
) -> PolicyLoss:
    """policy_loss(linear_logprob(hidden, weight, targets)) with the entropy bonus, in three GEMMs; differentiable in hidden and weight.

    hidden: [N, H], weight: [V, H], same float dtype, any strides. targets: [N] integers; outside [0, V) a row counts as masked and is
    counted. chunk_rows, logits_dtype, temperature: as linear_logprob. entropy_coef: weight of the entropy bonus. All others: as
    policy_loss. gspo chunks end where sequences end; the log-probs of a sequence longer than chunk_rows are formed in a pass of their own
    (4 GEMMs for it). With num_tokens or num_sequences None the local count is that of rows under the mask with a target in [0, V).
    dweight_out: [V, H] fp32 (fp64 for fp64 weights), owned by the caller: each backward pass adds the weight's gradient to it, and the
    weight gets none; needs weight.requires_grad. Otherwise the backward pass casts the gradient, kept in fp32, to the weight's dtype.
    Which of the two gradients is needed is decided here: a frozen weight or hidden skips its GEMM, and without grad it is one GEMM. The
    backward pass may be repeated (retain_graph); do not put the operator inside a checkpointed region. One host read of the row counts
    (gspo: and of the sequence lengths). Metrics include sum/entropy. Raises ValueError on a wrong shape, dtype, choice or range.
    """
    check_head(hidden, weight, targets, temperature, chunk_rows, logits_dtype)
    settings = PolicySettings(loss, clip_low, clip_high, dual_clip, beta, kl, agg, num_tokens, num_sequences, max_length, entropy_coef)
    check_policy(settings, hidden, advantages, old_logp, ref_logp, mask, seq_ids, on_policy)
    if dweight_out is not None:
        require_tensor("dweight_out", dweight_out, weight.shape, (compute_dtype(weight),), like=weight)
        require(weight.requires_grad, "dweight_out", "a weight without requires_grad", "a weight that requires a gradient")
    head = HeadSettings(temperature, chunk_rows, logits_dtype)
    run = implementation("linear_policy_loss", hidden)
    return run(hidden, weight, targets, advantages, old_logp, ref_logp, mask, seq_ids, on_policy, settings, head, dweight_out)


def linear_policy_loss_reference(*arguments) -> PolicyLoss:
    """`arguments`: those of chunked_policy_loss but for its last."""
    return chunked_policy_loss(*arguments, HeadPasses(RowPasses(row_stats, consumed_gradient), loss_and_gradients))


def chunked_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    mask: Tensor | None,
    seq_ids: Tensor | None,
    on_policy: Tensor | None,
    settings: PolicySettings,
    head: HeadSettings,
    dweight_out: Tensor | None,
    passes: HeadPasses,
) -> PolicyLoss:
    """linear_policy_loss with a backend's passes over the rows of a chunk of logits."""
    given = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    live = given & (targets >= 0) & (targets < weight.shape[0])
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight)]
    with torch.no_grad():
        batch = token_batch(settings, compute_dtype(hidden), advantages, old, ref, live, seq_ids)._replace(on_policy=on_policy)
        matrix = gemm_operand(weight)
        gradients = HeadGradients(hidden, matrix, *needs)
        rows, num_active = _order_rows(batch, settings, any(needs))
        value = batch.weight.new_zeros(())
        metrics = left_out(given, live)
        for start, stop in _units(batch, rows, settings, head.chunk_rows):
            unit = rows[start:stop]
            active = min(max(num_active - start, 0), len(unit))
            part, more = _unit(hidden, matrix, targets, batch, unit, active, settings, head, passes, gradients)
            value, metrics = value + part, combine_metrics([metrics, more])
    known = gradients.dhidden, gradients.dweight
    return PolicyLoss(attach_gradients(value, (hidden, weight), known, (None, dweight_out)), finish_metrics(metrics))


def _order_rows(batch: TokenBatch, s: PolicySettings, needs_gradient: bool) -> tuple[Tensor, int]:
    """Unmasked rows as [with gradient | metrics only], each in the order given, and how many have a gradient."""
    active = batch.mask
    if s.beta == 0 and s.entropy_coef == 0:
        active = active & (batch.advantages != 0)
        if s.loss == "gspo":  # a sequence's ratio sends a gradient to all of its tokens
            active = batch.mask & (sequence_sum(active.double(), batch.sequence)[batch.sequence] > 0)
    if not needs_gradient:
        active = torch.zeros_like(active)
    kind = torch.where(active, 0, torch.where(batch.mask, 1, 2))
    num_active, num_live = torch.stack([active.sum(), batch.mask.sum()]).tolist()
    return kind.argsort(stable=True)[:num_live], num_active


def _units(batch: TokenBatch, rows: Tensor, s: PolicySettings, chunk_rows: int) -> list[tuple[int, int]]:
    """Ranges of rows whose coefficients depend on no other row: chunks, and for gspo as many whole sequences as fit into a chunk.

    One empty range where there are no rows: the metrics have the same names on a rank that has none.
    """
    if not len(rows):
        return [(0, 0)]
    if s.loss != "gspo":
        return [(start, min(start + chunk_rows, len(rows))) for start in range(0, len(rows), chunk_rows)]
    _, lengths = torch.unique_consecutive(batch.sequence[rows], return_counts=True)
    units: list[tuple[int, int]] = []
    stop = 0
    for length in lengths.tolist():
        if units and stop + length - units[-1][0] <= chunk_rows:
            units[-1] = (units[-1][0], stop + length)
        else:
            units.append((stop, stop + length))
        stop += length
    return units


def _unit(
    hidden: Tensor,
    matrix: Tensor,
    targets: Tensor,
    batch: TokenBatch,
    rows: Tensor,
    num_active: int,
    s: PolicySettings,
    head: HeadSettings,
    passes: HeadPasses,
    gradients: HeadGradients,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of some rows; adds the gradients of the first num_active of them. One chunk, unless it is one long sequence."""
    pieces = [range(i, min(i + head.chunk_rows, len(rows))) for i in range(0, max(1, len(rows)), head.chunk_rows)]
    blocks = []
    for piece in pieces:
        index = rows[piece.start : piece.stop]
        states = hidden[index]
        logits = None  # the last chunk's go before the next one's come
        logits = chunk_logits(states, matrix, head.logits_dtype)
        blocks.append(passes.rows.row_stats(logits, targets[index], head.temperature))
    stats = RowStats(*(torch.cat(parts) for parts in zip(*blocks)))
    part = batch.rows(rows)
    part = part._replace(mask=stats.valid, weight=torch.where(stats.valid, part.weight, 0))
    mismatch = {}
    if part.on_policy is not None:
        old, mismatch = settled_old(stats.logp, part.old_logp, part.on_policy, part.on_policy & stats.valid)
        part = part._replace(old_logp=old, on_policy=None)
    value, dlogp, dentropy, metrics = passes.loss_and_gradients(stats.logp, stats.entropy, part, s)
    metrics |= mismatch
    metrics["count/invalid"] = (~stats.valid).sum()
    for piece in pieces:
        size = min(num_active - piece.start, len(piece))
        if size <= 0:
            break
        if len(pieces) > 1:  # this chunk's logits are gone: the long sequence needed all log-probs first
            states = hidden[rows[piece.start : piece.stop]]
            logits = dlogits = None
            logits = chunk_logits(states, matrix, head.logits_dtype)
        span = slice(piece.start, piece.start + size)
        index, row_part = rows[span], RowStats(*(field[span] for field in stats))
        bonus = None if dentropy is None else dentropy[span]
        dlogits = passes.rows.logit_gradient(logits[:size], targets[index], row_part, dlogp[span], bonus, head.temperature, hidden.dtype)
        gradients.add(index, states[:size], dlogits)
    return value, metrics
