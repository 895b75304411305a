"""What the Attacker does on this rank of a world, reduced to what must not depend on the number of ranks.

python ranks.py FOLDER RESULT, under torchrun or alone: rank 0 writes RESULT.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from aot_fast.attacker.flow_grpo import update
from aot_fast.attacker.model import load_attacker
from aot_fast.attacker.rollout import rollout
from aot_fast.config import EngineConfig, RunConfig
from aot_fast.engine import close_runtime, open_runtime, whole_state
from tests.attacker.rollouts import examples, gradients, scored
from tests.attacker.tiny_pipeline import BASE, LORA, perturb


def scenario(folder, runtime):
    """Results that every number of ranks must agree on (whole tensors on rank 0)."""
    engine = EngineConfig(persistence_threshold=100)
    full = load_attacker(replace(BASE, model=str(folder)), engine, runtime)
    sizes = [(p.ds_tensor.numel(), p.ds_numel) for p in full.player.module.parameters()]
    result = {
        "weights": whole_state(full.player),
        "largest_share": max(held / -(-whole // runtime.world) for held, whole in sizes),
    }
    attacker = load_attacker(replace(BASE, model=str(folder), lora=LORA, ema_decay=0.5, beta=0.1), engine, runtime)
    perturb(attacker.player, 1)
    attacker.ema.update()
    for count in (3, 1):  # on two ranks: two groups beside one, one beside none
        groups = rollout(attacker, examples(count), seed=0, round=1, step=count)
        metrics, found = gradients(attacker, scored(groups))
        result[count] = {"edits": edits_of(groups, runtime), "metrics": metrics, "gradients": found}
    for gather in ("block", "rollout"):
        other = load_attacker(replace(BASE, model=str(folder), lora=LORA, beta=0.1, gather=gather), engine, runtime)
        perturb(other.player, 1)
        for count in (3, 1):
            groups = rollout(other, examples(count), seed=0, round=1, step=count)
            metrics, found = gradients(other, scored(groups))
            result[gather, count] = {"edits": edits_of(groups, runtime), "metrics": metrics, "gradients": found}
    groups = rollout(attacker, examples(3), seed=0, round=1, step=3)
    result["update"] = update(attacker, scored(groups))
    result["weights_after"] = whole_state(attacker.player, trainable_only=True)
    result["averaged_edits"] = edits_of(rollout(attacker, examples(2), seed=0, round=1, step=3, group_size=2, train=False), runtime)
    with attacker.ema.applied():
        result["averages"] = whole_state(attacker.player, trainable_only=True)
    result["weights_restored"] = whole_state(attacker.player, trainable_only=True)
    return result


def edits_of(groups, runtime):
    """Question -> (seed, recorded log-probs, final latents) of each sample, of all ranks."""
    own = {
        group.edits[0].example.question.id: [
            (edit.seed, [float(step.logp) for step in made.steps], made.latents) for edit, made in zip(group.edits, group.samples)
        ]
        for group in groups
    }
    return {key: value for part in runtime.gather(own) for key, value in part.items()}


if __name__ == "__main__":
    runtime = open_runtime(EngineConfig(timeout_s=60), RunConfig(threads=1))
    found = scenario(Path(sys.argv[1]), runtime)
    if runtime.rank == 0:
        torch.save(found, sys.argv[2])
    close_runtime()
