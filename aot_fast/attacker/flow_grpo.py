"""Flow-GRPO (MATH.md sections 1 and 3): one optimizer step on scored groups of edits, each group on the rank that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import aot_fast.kernels as K
from aot_fast.attacker.model import Attacker
from aot_fast.attacker.replay import Item, replay, replay_batches
from aot_fast.attacker.reward import Answerer, Judge, score
from aot_fast.attacker.rollout import Group, rollout
from aot_fast.config import AttackerConfig, RewardConfig
from aot_fast.data.schema import Example, Verdict
from aot_fast.engine import Runtime, StepResult

CLIP = {"flow_sde": 1e-4, "dance": 1e-4, "cps": 1e-5, "ode": 1e-4}
CLIP_GUARD = 2e-6


@dataclass(frozen=True)
class ScoredGroup:
    """A group and what the reward found out about each of its edits."""

    group: Group
    verdicts: tuple[Verdict, ...]

    @property
    def rewards(self) -> list[float]:
        return [verdict.reward for verdict in self.verdicts]


def collect(
    attacker: Attacker,
    examples: Sequence[Example],
    reward: RewardConfig,
    answerer: Answerer,
    judge: Judge | None,
    *,
    seed: int,
    round: int,
    step: int,
) -> list[ScoredGroup]:
    """Roll out this rank's share of the step's questions and score the edits. A collective (the scoring itself is local)."""
    groups = rollout(attacker, examples, seed=seed, round=round, step=step)
    verdicts = iter(score([edit for group in groups for edit in group.edits], reward, answerer, judge))
    return [ScoredGroup(group, tuple(next(verdicts) for _ in group.edits)) for group in groups]


def update(attacker: Attacker, scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """One optimizer step on this rank's scored groups; returns metrics of all ranks. A collective: ranks may hold unequally many groups.

    L = mean over all samples and trained steps of max(-A r, -A clip(r, 1 - c, 1 + c)) + beta KL. The mean is over all ranks and
    micro-batches (DESIGN.md rule 7). Samples with a non-finite reward have A = 0. Raises ValueError when no step was recorded.
    """
    config, player, runtime = attacker.config, attacker.player, attacker.runtime
    advantages, metrics = group_advantages(attacker, [group.rewards for group in scored])
    items = [
        Item(part.group.encoding, step, advantage)
        for part, row in zip(scored, advantages)
        for sample, advantage in zip(part.group.samples, row)
        for step in sample.steps
    ]
    count = runtime.all_reduce(torch.tensor(float(len(items)), device=runtime.device))
    parts, healthy = [], torch.ones((), dtype=torch.bool, device=runtime.device)
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
        mismatch = torch.where(now.mask, (now.logp - now.old_logp).abs(), 0).max().detach()
        parts.append(result.metrics | {"sum/loss": result.loss.detach(), "max/logp_mismatch": mismatch})
    if not parts:
        raise ValueError("no rank has a recorded step to train on: attacker.dynamics is ode, or every question was left out")
    done = player.step(healthy)
    if done.applied and attacker.ema:
        attacker.ema.update()
    on_policy = all(part.group.version == player.version - done.applied for part in scored)
    return metrics | step_metrics(runtime, K.combine_metrics(parts), done, on_policy)


def clip_range(config: AttackerConfig) -> float:
    """The clip range in force: `config.clip`, or the default of the variant and the dynamics (MATH.md section 3)."""
    return config.clip or (CLIP_GUARD if config.variant == "guard" else CLIP[config.dynamics])


def group_advantages(attacker: Attacker, rewards: list[list[float]]) -> tuple[list[Tensor], dict[str, float]]:
    """Advantages of this rank's groups, one tensor [G] a group, and metrics of the rewards of all ranks.

    Rewards are gathered from all ranks, since `advantage_std: batch` takes its deviation over all of them.
    """
    runtime, batch = attacker.runtime, attacker.config.advantage_std == "batch"
    ranks = runtime.gather(rewards)
    flat = torch.tensor([value for groups in ranks for group in groups for value in group], dtype=torch.float32)
    sizes = [len(group) for groups in ranks for group in groups]
    # flow_grpo's "global_std" is a population deviation with its own eps.
    made = K.group_advantage(flat, sizes, std=attacker.config.advantage_std, **({"ddof": 0, "eps": 1e-4} if batch else {}))
    first = sum(len(groups) for groups in ranks[: runtime.rank])
    rows = made.values.to(runtime.device).split(sizes)[first : first + len(rewards)] if sizes else ()
    good = flat[flat.isfinite()].double()
    return list(rows), {
        "attacker/reward_mean": good.mean().item(),
        "attacker/reward_std": good.std(correction=0).item(),
        "attacker/degenerate_groups": float(made.degenerate.sum()),
        "attacker/groups": float(len(sizes)),
        "attacker/quarantined_samples": float(made.num_nonfinite),
    }


def step_metrics(runtime: Runtime, local: dict[str, Tensor], done: StepResult, on_policy: bool) -> dict[str, float]:
    """The step's metrics over all ranks. `logp_mismatch` only where the weights had not moved since the rollout (DESIGN.md rule 4)."""
    names = sorted(local)  # the same on all ranks: each ran at least one micro-batch
    values = torch.stack([local[name].float() for name in names])
    sums, maxima = runtime.all_reduce(values).tolist(), runtime.all_reduce(values, "max").tolist()
    total = {name: high if name.startswith("max/") else low for name, low, high in zip(names, sums, maxima)}
    samples = max(1.0, total["count/samples"])
    metrics = {
        "attacker/loss": total["sum/loss"],
        "attacker/ratio_mean": total["sum/ratio"] / samples,
        "attacker/ratio_deviation": total["max/ratio_deviation"],
        "attacker/approx_kl": total["sum/kl_k3"] / samples,
        "attacker/grad_norm": done.grad_norm,
        "attacker/lr": done.lr,
        "attacker/applied": float(done.applied),
        "attacker/trained_steps": total["count/samples"],
    }
    for name in ("kl", "drift"):
        if f"sum/{name}" in total:
            metrics[f"attacker/{name}"] = total[f"sum/{name}"] / samples
    for name in ("clip_low", "clip_high", "dropped"):
        if f"count/{name}" in total:
            metrics[f"attacker/{name}_fraction"] = total[f"count/{name}"] / samples
    # A rank without groups does not know; all ranks have to agree on the keys.
    if runtime.all_reduce(torch.tensor(float(on_policy), device=runtime.device), "min") > 0:
        metrics["attacker/logp_mismatch"] = total["max/logp_mismatch"]
    return metrics
