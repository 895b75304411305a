"""Flow-GRPO (MATH.md sections 1 and 3): one optimizer step on scored groups of edits, each group on the rank that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import aot_fast.kernels as K
from aot_fast.attacker.model import Attacker
from aot_fast.attacker.replay import Item, replay, replay_batches
from aot_fast.attacker.reward import Answerer, Judge, Likelihood, score
from aot_fast.attacker.rollout import Group
from aot_fast.config import AttackerConfig, RewardConfig
from aot_fast.data.schema import Verdict
from aot_fast.engine import Runtime

CLIP = {"flow_sde": 1e-4, "dance": 1e-4, "cps": 1e-5, "ode": 1e-4}
CLIP_GUARD = 2e-6


@dataclass(frozen=True)
class ScoredGroup:
    """A group and what the reward found out about each of its edits."""

    group: Group
    verdicts: tuple[Verdict, ...]


def judged(
    groups: Sequence[Group], reward: RewardConfig, answerer: Answerer, judge: Judge | None, likelihood: Likelihood | None = None
) -> list[ScoredGroup]:
    """Score the edits of this rank's groups. No collective: the answering Defender must be whole already."""
    verdicts = iter(score([edit for group in groups for edit in group.edits], reward, answerer, judge, likelihood))
    return [ScoredGroup(group, tuple(next(verdicts) for _ in group.edits)) for group in groups]


def update(attacker: Attacker, scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """One optimizer step on this rank's scored groups; returns metrics of all ranks. A collective: ranks may hold unequally many groups.

    L = mean over all samples and trained steps of max(-A r, -A clip(r, 1 - c, 1 + c)) + beta KL. The mean is over all ranks and
    micro-batches (DESIGN.md rule 7). Samples with a non-finite reward have A = 0. Raises ValueError when no step was recorded.
    """
    config, player, runtime = attacker.config, attacker.player, attacker.runtime
    advantages, metrics = group_advantages(attacker, scored)
    items = [
        Item(part.group.encoding, step, advantage, fresh=part.group.version == player.version)
        for part, row in zip(scored, advantages)
        for sample, advantage in zip(part.group.samples, row)
        for step in sample.steps
    ]
    count = runtime.all_reduce(torch.tensor(float(len(items)), device=runtime.device))
    parts, healthy = [], torch.ones((), dtype=torch.bool, device=runtime.device)
    with attacker.replaying():
        for batch in replay_batches(attacker, items):
            now = replay(attacker, batch)
            result = K.flow_policy_loss(
                now.logp,
                now.old_logp,
                now.advantages,
                clip=clip_range(config),
                kl=now.kl,
                beta=config.beta,
                variant=config.variant,
                drift=now.drift,
                std=now.std,
                dt=now.dt,
                adv_clip=config.adv_clip,
                mask=now.mask,
                count=count,
            )
            player.backward(result.loss)
            healthy &= result.loss.detach().isfinite()
            parts.append(result.metrics | {"sum/loss": result.loss.detach(), "max/logp_mismatch": now.mismatch.max()})
    if not parts:
        raise ValueError("no rank has a recorded step to train on: attacker.dynamics is ode, or every question was left out")
    done = player.step(healthy)
    if done.applied and attacker.ema:
        attacker.ema.update()
    metrics |= readable(reduced(runtime, K.combine_metrics(parts)))
    return metrics | {"grad_norm": done.grad_norm, "lr": done.lr, "applied": float(done.applied)}


def clip_range(config: AttackerConfig) -> float:
    """The clip range in force: `config.clip`, or the default of the variant and the dynamics (MATH.md section 3)."""
    return config.clip or (CLIP_GUARD if config.variant == "guard" else CLIP[config.dynamics])


def group_advantages(attacker: Attacker, scored: Sequence[ScoredGroup]) -> tuple[list[Tensor], dict[str, float]]:
    """Advantages of this rank's groups, one tensor [G] a group, and metrics of the verdicts of all ranks.

    Rewards are gathered from all ranks, since `advantage_std: batch` takes its deviation over all of them.
    """
    runtime, std = attacker.runtime, attacker.config.advantage_std
    ranks = runtime.gather([[(v.reward, v.q, v.uniqueness, v.efficacy) for v in part.verdicts] for part in scored])
    table = torch.tensor([row for groups in ranks for group in groups for row in group], dtype=torch.float64).view(-1, 4)
    sizes = [len(group) for groups in ranks for group in groups]
    # flow_grpo's "global_std" is a population deviation with its own eps.
    made = K.group_advantage(table[:, 0].contiguous(), sizes, std=std, **({"ddof": 0, "eps": 1e-4} if std == "batch" else {}))
    first = sum(len(groups) for groups in ranks[: runtime.rank])
    rows = made.values.float().to(runtime.device).split(sizes)[first : first + len(scored)] if sizes else ()
    good = table[table[:, 0].isfinite()]
    metrics = dict(zip(("reward", "q", "u", "e"), good.mean(0).tolist())) | {"reward/std": good[:, 0].std(correction=0).item()}
    counts = {"groups": len(sizes), "groups/degenerate": int(made.degenerate.sum()), "samples/quarantined": int(made.num_nonfinite)}
    return list(rows), metrics | {name: float(value) for name, value in counts.items()}


def reduced(runtime: Runtime, local: dict[str, Tensor]) -> dict[str, float]:
    """Sums, counts and maxima over all ranks; they have the same names everywhere, since every rank ran a micro-batch."""
    names = sorted(local)
    values = torch.stack([local[name].float() for name in names])
    sums, maxima = runtime.all_reduce(values).tolist(), runtime.all_reduce(values, "max").tolist()
    return {name: high if name.startswith("max/") else low for name, low, high in zip(names, sums, maxima)}


def readable(totals: dict[str, float]) -> dict[str, float]:
    """Totals of the step under the names of the log: `sum/` as means over the trained steps, `count/` and `max/` as they are.

    `kl` is the rollout's policy to the trained one; `kl_ref`, where there is one, the trained policy to the base.
    """
    samples = max(1.0, totals["count/samples"])
    means = {name.removeprefix("sum/"): value / samples for name, value in totals.items() if name.startswith("sum/")}
    rest = {name.split("/", 1)[1]: value for name, value in totals.items() if not name.startswith("sum/")}
    reference = {"kl_ref": means.pop("kl")} if "kl" in means else {}
    clipped = (rest.get("clip_low", 0.0) + rest.get("clip_high", 0.0)) / samples
    return means | rest | reference | {"loss": totals["sum/loss"], "kl": means["kl_k3"], "clip": clipped}
