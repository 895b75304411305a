"""DAPO (MATH.md sections 1 and 2): one optimizer step of the Defender on groups of its own answers.

`update` is the algorithm. Rows are (prompt, response) pairs; N is the number of response tokens of the whole step, over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

import aot_fast.kernels as K
from aot_fast.data.schema import Example
from aot_fast.defender.groups import Group
from aot_fast.defender.head import batch_loss, reference_logp
from aot_fast.defender.model import Defender
from aot_fast.defender.packing import Batch, Row, collate
from aot_fast.defender.prompt import encode
from aot_fast.engine import microbatches
from aot_fast.metrics import reduce_over_ranks


def update(defender: Defender, examples: Sequence[Example], groups: list[Group], reference: Defender | None = None) -> dict[str, float]:
    """One optimizer step on `groups`, which every rank holds; each rank trains its share of the rows.

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
    rows = share_of(defender, examples, groups, advantages.values)
    num_tokens, num_sequences = normalisers(defender, groups)
    metrics = []
    for part in microbatches(runtime, rows, config.microbatch):
        batch = as_batch(defender, part or [padding_row(defender, examples, groups)])
        ref_logp = reference_logp(defender, reference, batch)  # first: between forward and backward ZeRO-3 would lose its order
        loss = batch_loss(
            defender,
            batch,
            old_logp=batch.logp.flatten(),
            on_policy=(versions_of(batch, groups) == player.version).flatten(),
            ref_logp=ref_logp,
            mask=batch.mask.flatten(),
            entropy_coef=config.entropy_coef,
            seq_ids=local_ids(batch.sequences).flatten(),
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
    return readable(totals, num_tokens) | {
        "groups/degenerate": float(advantages.degenerate.sum()),
        "grad_norm": step.grad_norm,
        "lr": step.lr,
        "applied": float(step.applied),
    }


def share_of(defender: Defender, examples: Sequence[Example], groups: list[Group], advantages: Tensor) -> list[Row]:
    """This rank's rows: every world-th response, so that lengths spread evenly and a prompt is encoded once a group."""
    first = [0, *accumulate(len(g.responses) for g in groups)]
    mine = set(defender.runtime.mine(first[-1]))
    rows = []
    for group, start in zip(groups, first):
        own = [j for j in range(len(group.responses)) if start + j in mine]
        if not own:
            continue
        prompt = encode(defender, examples[group.example])
        for j in own:
            r, masked = group.responses[j], defender.config.mask_truncated and group.responses[j].truncated
            rows.append(Row(prompt, r.ids, r.logp, float(advantages[start + j]), start + j, weight=float(not masked)))
    return rows


def padding_row(defender: Defender, examples: Sequence[Example], groups: list[Group]) -> Row:
    """A row of zero weight for a rank that has none left: its forward and backward keep ZeRO-3 in step (DESIGN.md rule 5)."""
    response = groups[0].responses[0]
    return Row(encode(defender, examples[groups[0].example]), response.ids, response.logp, 0.0, 0, weight=0.0)


def normalisers(defender: Defender, groups: list[Group]) -> tuple[float, float]:
    """Unmasked response tokens and sequences of the whole optimizer step, over all ranks and micro-batches."""
    kept = [r for g in groups for r in g.responses if not (defender.config.mask_truncated and r.truncated)]
    return float(max(1, sum(len(r.ids) for r in kept))), float(max(1, len(kept)))


def as_batch(defender: Defender, rows: list[Row]) -> Batch:
    return collate(rows, defender.tokenizer.pad_token_id, defender.core.config.image_token_id, defender.runtime.device)


def versions_of(batch: Batch, groups: list[Group]) -> Tensor:
    """[B, R] policy version that sampled each row."""
    versions = torch.tensor([g.version for g in groups for _ in g.responses], device=batch.sequences.device)
    return versions[batch.sequences]


def local_ids(sequences: Tensor) -> Tensor:
    """[B, R] row numbers: sorted and contiguous, as the operators want `seq_ids`."""
    return torch.arange(len(sequences), device=sequences.device)[:, None].expand(sequences.shape)


def readable(totals: dict[str, float], num_tokens: float) -> dict[str, float]:
    """Totals of the step under the names of the log: `sum/` as means over the tokens, `count/` and `max/` as they are."""
    means = {name.removeprefix("sum/"): value / num_tokens for name, value in totals.items() if name.startswith("sum/")}
    rest = {name.split("/", 1)[1]: value for name, value in totals.items() if not name.startswith("sum/")}
    clipped = sum(totals[f"count/clip_{side}"] for side in ("low", "high", "dual")) / num_tokens
    return means | rest | {"loss": totals["sum/loss"], "kl": means["kl_k3"], "clip": clipped}
