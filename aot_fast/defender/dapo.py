"""DAPO (MATH.md sections 1 and 2): one optimizer step of the Defender on groups of its own answers.

`update` is the algorithm. Rows are (prompt, response) pairs; N is the number of response tokens of a micro-batch.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

import aot_fast.kernels as K
from aot_fast.defender.counters import update_counters
from aot_fast.defender.groups import Group
from aot_fast.defender.head import batch_loss, reference_logp
from aot_fast.defender.model import Defender
from aot_fast.defender.packing import Batch, batch_of
from aot_fast.defender.prompts import Prompts
from aot_fast.defender.shares import rows_of, share_of
from aot_fast.metrics import reduce_over_ranks


def update(defender: Defender, prompts: Prompts, groups: list[Group], reference: Defender | None = None) -> dict[str, float]:
    """One optimizer step on `groups`, which every rank holds; each rank trains its share of them.

    Where the policy has not moved since a group was sampled, old = stopgrad(new) and the ratio is exactly 1; there the log-prob recorded
    at the rollout is only compared with the trainer's (logp_mismatch, DESIGN.md rule 4).
    `reference`: the frozen first Defender, for the KL of a full fine-tune (LoRA switches its adapter off instead).
    Returns metrics; an empty list of groups gives {"skipped": 1}. A collective.
    """
    config, runtime, player = defender.config, defender.runtime, defender.player
    assert player is not None
    if not groups:
        return {"skipped": 1.0}
    advantages = K.group_advantage(
        torch.tensor([r for g in groups for r in g.rewards]), [len(g.rewards) for g in groups], std=config.advantage_std
    )
    start = time.perf_counter()
    num_tokens, num_sequences = normalisers(defender, groups)
    wanted = trained_on(defender, groups, advantages.values)
    metrics = []
    shares = share_of(defender, groups, wanted)
    prompts.prefetch(groups[part.group].example for parts in shares for part in parts)
    with defender.updating():
        for parts in shares:
            batch = batch_of(defender, rows_of(defender, prompts, groups, parts, advantages.values))
            ref_logp = reference_logp(defender, reference, batch)  # first: between forward and backward ZeRO-3 would lose its order
            loss = batch_loss(
                defender,
                batch,
                old_logp=batch.logp,
                on_policy=versions_of(batch, groups) == player.version,
                ref_logp=ref_logp,
                mask=batch.mask,
                entropy_coef=config.entropy_coef,
                seq_ids=batch.rows,
                loss=config.loss,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                dual_clip=config.dual_clip,
                beta=config.beta,
                kl=config.kl,
                agg=config.agg,
                num_tokens=num_tokens,
                num_sequences=num_sequences,
                max_length=config.max_response_tokens,
            )
            player.backward(loss.loss)
            metrics.append({**loss.metrics, "sum/loss": loss.loss.detach()})
    totals = reduce_over_ranks(runtime, K.combine_metrics(metrics))
    step = player.step(healthy=math.isfinite(totals["sum/loss"]))
    lengths = [len(r.ids) for g in groups for r in g.responses]
    counters = update_counters(defender, groups, wanted, time.perf_counter() - start)  # the step has just waited for the device
    return (
        readable(totals, max(1, sum(n for n, yes in zip(lengths, wanted) if yes)))
        | counters
        | {
            "groups/degenerate": float(advantages.degenerate.sum()),
            "rows/dropped": float(wanted.count(False)),
            "grad_norm": step.grad_norm,
            "lr": step.lr,
            "applied": float(step.applied),
        }
    )


def trained_on(defender: Defender, groups: list[Group], advantages: Tensor) -> list[bool]:
    """Of each response whether it can have a gradient: not if it is masked, or its advantage 0 without KL and entropy bonus."""
    config = defender.config
    always = config.beta != 0 or config.entropy_coef != 0
    masked = [config.mask_truncated and r.truncated for g in groups for r in g.responses]
    return [not left_out and (always or advantage != 0) for left_out, advantage in zip(masked, advantages.tolist())]


def normalisers(defender: Defender, groups: list[Group]) -> tuple[float, float]:
    """Unmasked response tokens and sequences of the whole optimizer step, over all ranks and micro-batches."""
    kept = [r for g in groups for r in g.responses if not (defender.config.mask_truncated and r.truncated)]
    return float(max(1, sum(len(r.ids) for r in kept))), float(max(1, len(kept)))


def versions_of(batch: Batch, groups: list[Group]) -> Tensor:
    """[N] policy version that sampled each token's response."""
    versions = torch.tensor([g.version for g in groups for _ in g.responses], device=batch.sequences.device)
    return versions[batch.sequences]


def readable(totals: dict[str, float], num_tokens: float) -> dict[str, float]:
    """Totals of the step under the names of the log: `sum/` as means over the tokens trained on, `count/` and `max/` as they are."""
    means = {name.removeprefix("sum/"): value / num_tokens for name, value in totals.items() if name.startswith("sum/")}
    rest = {name.split("/", 1)[1]: value for name, value in totals.items() if not name.startswith("sum/")}
    clipped = sum(totals[f"count/clip_{side}"] for side in ("low", "high", "dual")) / num_tokens
    return means | rest | {"loss": totals["sum/loss"], "kl": means["kl_k3"], "clip": clipped}
