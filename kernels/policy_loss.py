"""Clipped policy-gradient losses over response tokens (MATH section 2): PPO/DAPO, GSPO, CISPO.

    d = clamp(logp - old, -20, 20), r = e^d
    ppo    u = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A);  u = max(u, dual_clip A) where A < 0
    gspo   as ppo with one ratio a sequence, r = exp(clamp(mean over its tokens of the unclamped logp - old)), no dual clip
    cispo  u = stopgrad(clip(r)) A logp
    L = sum_i w_i (-u_i + beta KL_i - entropy_coef entropy_i)
    w      token: 1 / num_tokens;  seq_mean: 1 / (tokens of the sequence * num_sequences);  seq_sum_norm: 1 / (num_sequences * max_length)
    KL     q = clamp(ref - logp, -20, 20);  k3: e^q - q - 1;  k1: -q;  k2: q^2 / 2

N rows (tokens). Floor: a launch; 4 to 21 B read and 4 B written a token. dL/dlogp is formed in the forward pass.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import FLOATS, INTEGERS, compute_dtype, require, require_choice, require_tensor
from .dispatch import implementation
from .known_gradient import attach_gradients
from .metrics import PolicyLoss, finish_metrics, masked_max

LOG_RATIO_LIMIT = 20.0
Normaliser = float | Tensor | None


@dataclass(frozen=True)
class PolicySettings:
    """The settings of the loss that both policy_loss and linear_policy_loss take; meanings in policy_loss."""

    loss: str
    clip_low: float
    clip_high: float
    dual_clip: float | None
    beta: float
    kl: str
    agg: str
    num_tokens: Normaliser
    num_sequences: Normaliser
    max_length: float | None
    entropy_coef: float


class TokenBatch(NamedTuple):
    """Tokens as the loss sees them, [N] each. What lies under a False mask has already been replaced."""

    advantages: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    mask: Tensor
    weight: Tensor
    """w of the equation; 0 where masked."""
    sequence: Tensor | None
    """int64: 0, 1, 2, ... along the rows; only for gspo and the sequence aggregations."""
    on_policy: Tensor | None = None
    """bool: where old is stopgrad(logp) and old_logp only what it is compared with; None once old_logp is what the loss uses."""

    def rows(self, index: Tensor | slice) -> "TokenBatch":
        """The same for some of the rows."""
        part = TokenBatch(*(None if field is None else field[index] for field in self))
        return part if part.sequence is None else part._replace(sequence=_numbered(part.sequence))


def policy_loss(
    logp: Tensor,
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
    valid: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    on_policy: Tensor | None = None,
) -> PolicyLoss:
    """The policy loss of N response tokens and its metrics; differentiable in logp (and entropy).

    logp, old_logp, ref_logp, entropy: [N] float. advantages: [N], one a token. mask: [N] bool, False leaves a token out; old, ref, logp and
    advantages may be anything there, NaN included, and the gradient is exactly 0. valid: [N] bool as LogProb.valid; False counts as masked.
    old_logp=None: stopgrad(logp), ratio 1. seq_ids: [N] integers, sorted, so that a sequence is contiguous; needed by gspo, seq_mean, and
    by seq_sum_norm unless num_sequences is given; gspo and seq_mean need whole sequences in a call.
    loss: "ppo", "gspo" or "cispo". clip_low, clip_high: at least 0. dual_clip: more than 1, None for off. beta: weight of the KL to
    ref_logp (at least 0; more than 0 needs ref_logp). kl: "k1", "k2" or "k3". agg: "token", "seq_mean" or "seq_sum_norm" (needs
    max_length). num_tokens, num_sequences: the global normaliser of the optimizer step, a float or a 0-d tensor; None: the local count of
    unmasked tokens, or of sequences with one, at least 1. entropy_coef: weight of the entropy bonus, needs entropy.
    on_policy: [N] bool, needs old_logp: tokens sampled by the very policy that is trained. There the ratio is 1, as with old_logp=None, and
    old_logp is only compared with logp: max/logp_mismatch, which should be rounding.
    Returns PolicyLoss(loss 0-d, metrics): names in aot_fast.kernels.metrics. Raises ValueError on a wrong shape, dtype, choice or range.
    """
    settings = PolicySettings(loss, clip_low, clip_high, dual_clip, beta, kl, agg, num_tokens, num_sequences, max_length, entropy_coef)
    require_tensor("logp", logp, (None,), FLOATS)
    check_policy(settings, logp, advantages, old_logp, ref_logp, mask, seq_ids, on_policy)
    require(entropy_coef == 0 or entropy is not None, "entropy", None, f"[N] because entropy_coef is {entropy_coef}")
    if entropy is not None:
        require_tensor("entropy", entropy, logp.shape, FLOATS, like=logp)
    if valid is not None:
        require_tensor("valid", valid, logp.shape, (torch.bool,), like=logp)
    mismatch = {}
    if on_policy is not None:
        live = on_policy if valid is None else on_policy & valid
        old_logp, mismatch = settled_old(logp.detach(), old_logp, on_policy, live if mask is None else live & mask)
    out = implementation("policy_loss", logp)(logp, entropy, advantages, old_logp, ref_logp, mask, valid, seq_ids, settings)
    return PolicyLoss(out.loss, out.metrics | finish_metrics(mismatch))


def settled_old(logp: Tensor, old: Tensor, on_policy: Tensor, compared: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """old, with logp in its place where the policy has not moved; and how far they are apart where they are compared, [N] bool."""
    return torch.where(on_policy, logp, old), {"max/logp_mismatch": masked_max((logp - old).abs(), compared)}


def check_policy(
    s: PolicySettings,
    rows: Tensor,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    mask: Tensor | None,
    seq_ids: Tensor | None,
    on_policy: Tensor | None,
) -> None:
    """Checks what policy_loss and linear_policy_loss have in common; rows is any tensor with N as its first size."""
    shape = rows.shape[:1]
    require_tensor("advantages", advantages, shape, FLOATS, like=rows)
    for name, tensor, dtypes in (
        ("old_logp", old, FLOATS),
        ("ref_logp", ref, FLOATS),
        ("mask", mask, (torch.bool,)),
        ("seq_ids", seq_ids, INTEGERS),
        ("on_policy", on_policy, (torch.bool,)),
    ):
        if tensor is not None:
            require_tensor(name, tensor, shape, dtypes, like=rows)
    require_choice("loss", s.loss, ("ppo", "gspo", "cispo"))
    require_choice("kl", s.kl, ("k1", "k2", "k3"))
    require_choice("agg", s.agg, ("token", "seq_mean", "seq_sum_norm"))
    require(s.clip_low >= 0, "clip_low", s.clip_low, "at least 0")
    require(s.clip_high >= 0, "clip_high", s.clip_high, "at least 0")
    require(s.dual_clip is None or s.dual_clip > 1, "dual_clip", s.dual_clip, "more than 1, or None")
    require(s.beta >= 0, "beta", s.beta, "at least 0")
    require(on_policy is None or old is not None, "old_logp", None, "[N] because on_policy is given")
    require(s.beta == 0 or ref is not None, "ref_logp", None, f"[N] because beta is {s.beta}")
    require(s.agg != "seq_sum_norm" or s.max_length is not None, "max_length", None, "a length because agg is 'seq_sum_norm'")
    needs_sequences = s.loss == "gspo" or s.agg == "seq_mean" or (s.agg == "seq_sum_norm" and s.num_sequences is None)
    require(not needs_sequences or seq_ids is not None, "seq_ids", None, f"[N] because loss is {s.loss!r} and agg {s.agg!r}")


def policy_loss_reference(
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
    given = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    live = given if valid is None else given & valid
    batch = token_batch(settings, compute_dtype(logp), advantages, old, ref, live, seq_ids)
    value, dlogp, dentropy, metrics = loss_and_gradients(logp, entropy, batch, settings)
    metrics |= left_out(given, live)
    return PolicyLoss(attach_gradients(value, (logp, entropy), (dlogp, dentropy)), finish_metrics(metrics))


def left_out(mask: Tensor, live: Tensor) -> dict[str, Tensor]:
    """Metrics of the tokens that the loss does not see."""
    return {"count/masked": (~mask).sum(), "count/invalid": (mask & ~live).sum()}


def token_batch(
    s: PolicySettings, dtype: torch.dtype, advantages: Tensor, old: Tensor | None, ref: Tensor | None, mask: Tensor, seq_ids: Tensor | None
) -> TokenBatch:
    """Selects under the mask, in the dtype that the loss computes in, and forms the weights. Selecting comes before any exp: what is masked
    may be NaN or 300, and 0 times its exponential is not 0."""
    old, ref = (None if t is None else torch.where(mask, t.detach().to(dtype), 0) for t in (old, ref))
    sequence = None if seq_ids is None else _numbered(seq_ids)
    weight = _token_weights(s, mask, sequence).to(dtype)
    return TokenBatch(torch.where(mask, advantages.detach().to(dtype), 0), old, ref, mask, weight, sequence)


def _numbered(seq_ids: Tensor) -> Tensor:
    """Sequences as 0, 1, 2, ... in the order of the rows."""
    starts = torch.zeros(len(seq_ids), dtype=torch.int64, device=seq_ids.device)
    starts[1:] = seq_ids[1:] != seq_ids[:-1]
    return starts.cumsum(0)


def _token_weights(s: PolicySettings, mask: Tensor, sequence: Tensor | None) -> Tensor:
    """w [N] in fp64."""
    if s.agg == "token":
        count = mask.sum().clamp(min=1) if s.num_tokens is None else s.num_tokens
        return torch.where(mask, 1.0 / _as_fp64(count, mask), 0)
    lengths = None if sequence is None else sequence_sum(mask.double(), sequence)
    num_sequences = (lengths > 0).sum().clamp(min=1) if s.num_sequences is None else s.num_sequences
    per_sequence = lengths[sequence].clamp(min=1) if s.agg == "seq_mean" else s.max_length
    return torch.where(mask, 1.0 / (_as_fp64(num_sequences, mask) * per_sequence), 0)


def _as_fp64(value: float | Tensor, like: Tensor) -> Tensor:
    return (
        value.detach().to(like.device, torch.float64)
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=torch.float64, device=like.device)
    )


def sequence_sum(values: Tensor, sequence: Tensor) -> Tensor:
    """Sums by sequence, [N]: there cannot be more sequences than rows, and their number stays on the device."""
    return torch.zeros_like(values).index_add(0, sequence, values)


def loss_and_gradients(
    logp: Tensor, entropy: Tensor | None, batch: TokenBatch, s: PolicySettings
) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
    """The equation. Returns L, dL/dlogp [N], dL/dentropy [N] or None, and the metrics of these rows; nothing returned has a graph."""
    dtype = batch.weight.dtype
    with torch.enable_grad():
        leaf = torch.where(batch.mask, logp.detach().to(dtype), 0).requires_grad_()
        old = leaf.detach() if batch.old_logp is None else batch.old_logp
        log_ratio = leaf - old
        ratio = _ratio(log_ratio, batch, s)
        terms = -_surrogate(ratio, leaf, batch.advantages, s)
        if batch.ref_logp is not None:
            ref_kl = _kl(batch.ref_logp - leaf, s.kl)
            if s.beta > 0:
                terms = terms + s.beta * ref_kl
        value = (batch.weight * terms).double().sum()
        (dlogp,) = torch.autograd.grad(value, leaf)
    value, dlogp = value.detach(), torch.where(batch.mask, dlogp, 0)
    metrics = _metrics(log_ratio.detach(), ratio.detach(), batch, s)
    metrics["count/zero_coefficient"] = (batch.mask & (dlogp == 0)).sum()
    if batch.ref_logp is not None:
        metrics["sum/kl_ref"] = _masked_sum(ref_kl.detach(), batch.mask)
    dentropy = None
    if entropy is not None:
        entropy = torch.where(batch.mask, entropy.detach().to(dtype), 0)
        metrics["sum/entropy"] = entropy.double().sum()
        value = value - s.entropy_coef * (batch.weight * entropy).double().sum()
        dentropy = -s.entropy_coef * batch.weight if s.entropy_coef != 0 else None
    return value.to(dtype), dlogp, dentropy, metrics


def _ratio(log_ratio: Tensor, batch: TokenBatch, s: PolicySettings) -> Tensor:
    if s.loss == "gspo":
        log_ratio = torch.where(batch.mask, log_ratio, 0).double()
        length = sequence_sum(batch.mask.double(), batch.sequence).clamp(min=1)
        log_ratio = (sequence_sum(log_ratio, batch.sequence) / length)[batch.sequence].to(batch.weight.dtype)
    return torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def _surrogate(ratio: Tensor, logp: Tensor, advantages: Tensor, s: PolicySettings) -> Tensor:
    """u of the equation."""
    clipped = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
    if s.loss == "cispo":
        return clipped.detach() * advantages * logp
    u = torch.minimum(ratio * advantages, clipped * advantages)
    if s.loss == "ppo" and s.dual_clip is not None:
        u = torch.where(advantages < 0, torch.maximum(u, s.dual_clip * advantages), u)
    return u


def _kl(q: Tensor, kind: str) -> Tensor:
    """The per-token estimate of KL(new || ref) from q = ref - logp."""
    q = q.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if kind == "k1":
        return -q
    return q.square() / 2 if kind == "k2" else torch.expm1(q) - q


def _metrics(log_ratio: Tensor, ratio: Tensor, batch: TokenBatch, s: PolicySettings) -> dict[str, Tensor]:
    mask, advantages = batch.mask, batch.advantages
    d = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    dual = torch.zeros_like(mask) if s.loss != "ppo" or s.dual_clip is None else (advantages < 0) & (ratio > s.dual_clip)
    return {
        "count/tokens": mask.sum(),
        "sum/ratio": _masked_sum(ratio, mask),
        "max/ratio_deviation": masked_max((ratio - 1).abs(), mask),
        "count/clip_low": (mask & (advantages < 0) & (ratio < 1 - s.clip_low)).sum(),
        "count/clip_high": (mask & (advantages > 0) & (ratio > 1 + s.clip_high)).sum(),
        "count/clip_dual": (mask & dual).sum(),
        "sum/kl_k1": _masked_sum(-d, mask),
        "sum/kl_k3": _masked_sum(torch.expm1(d) - d, mask),
        "sum/advantage": _masked_sum(advantages, mask),
        "sum/advantage_squared": _masked_sum(advantages.square(), mask),
    }


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0).double().sum()
