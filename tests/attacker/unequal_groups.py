"""Optimizer steps on two ranks that hold unequally many groups, under torchrun: the last line says that they came through.

python unequal_groups.py FOLDER
"""

import sys
from dataclasses import replace
from pathlib import Path

from aot_fast.attacker.flow_grpo import update
from aot_fast.attacker.model import load_attacker
from aot_fast.attacker.rollout import rollout
from aot_fast.config import EngineConfig, RunConfig
from aot_fast.engine import close_runtime, open_runtime
from tests.attacker.rollouts import examples, scored
from tests.attacker.tiny_pipeline import BASE, LORA


def main(folder):
    runtime = open_runtime(EngineConfig(timeout_s=60), RunConfig(threads=1))
    config = replace(BASE, model=str(folder), lora=LORA, group_size=2, microbatch=3)  # 3 groups are 12 items, 5 are 20: 4 and 7 batches
    attacker = load_attacker(config, EngineConfig(persistence_threshold=100), runtime)
    groups = rollout(attacker, examples(10), seed=0, round=1, step=0)
    assert len(groups) == 5
    mine = groups[: 3 if runtime.rank == 0 else 5]
    cases = {
        "3 and 5 groups": (mine, lambda i, j: float(j)),
        "nothing to learn on rank 0": (mine, lambda i, j: float(j) * runtime.rank),
        "none on rank 1": (mine if runtime.rank == 0 else [], lambda i, j: float(j)),
    }
    for name, (held, reward) in cases.items():
        metrics = update(attacker, scored(held, reward))
        assert metrics["applied"] == 1, (name, metrics)
        assert metrics["groups"] == {"none on rank 1": 3}.get(name, 8), (name, metrics)
    assert attacker.player.version == len(cases)
    if runtime.rank == 0:
        print("came through")
    close_runtime()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
