"""What the Attacker's settings of where weights are whole cost, and how far log-probs depend on the shapes they are formed at.

    torchrun --nproc_per_node 2 bench/attacker_modes.py --json bench/results/cpu/attacker_modes.json

gather: seconds of sampling and of an update with weights gathered block by block, for the rollout, and for the update too: the same samples
and gradients (compared), steps that take turns. shapes: a rollout's recorded log-probs, of batches of 8, against those replayed in
micro-batches of other sizes under the same weights; in bf16 and fp32. The bundled small pipeline under DeepSpeed ZeRO-3.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from attacker import TOLERANCE, changed, disturb, gradients_of, step  # noqa: E402
from attacker_work import questions, rewarded, write  # noqa: E402
from run import machine  # noqa: E402

from aot_fast.attacker.flow_grpo import update  # noqa: E402
from aot_fast.attacker.model import Attacker, load_attacker  # noqa: E402
from aot_fast.attacker.rollout import rollout  # noqa: E402
from aot_fast.config import AttackerConfig, EngineConfig, LoraConfig, OptimizerConfig, RunConfig  # noqa: E402
from aot_fast.data.schema import Example  # noqa: E402
from aot_fast.engine import Runtime, close_runtime, open_runtime  # noqa: E402

SIZE = 64 * 64
GROUP = 8
CONFIG = AttackerConfig(
    model="asset:tiny/attacker",
    lora=LoraConfig(rank=16, alpha=32),
    optimizer=OptimizerConfig(lr=1e-9),  # so that all steps are taken by the same weights
    target_pixels=SIZE,
    reference_pixels=SIZE,
    condition_pixels=SIZE,
    num_steps=10,
    window=3,
    window_range=(0, 5),
    group_size=GROUP,
    rollout_batch=GROUP,
    microbatch=GROUP,
)
ENGINE = EngineConfig(persistence_threshold=100)
"""So small that next to nothing stays whole by itself: the bundled pipeline's weights are small."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step, over all ranks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="file for the result")
    parser.add_argument("--commit", default="", help="written into the result; default: git's word")
    args = parser.parse_args()
    runtime = open_runtime(ENGINE, RunConfig())
    asked = questions(args.prompts)
    result = {"command": shlex.join(["bench/attacker_modes.py", *sys.argv[1:]]), "machine": machine(runtime.device.type, args.commit)}
    result |= {"ranks": runtime.world, "gather": gathers(runtime, asked, args.repeats), "shapes": shapes(runtime, asked)}
    if runtime.rank == 0:
        write(result, args.json)
        print(json.dumps({name: value for name, value in result.items() if name != "machine"}, indent=1))
    close_runtime()


def gathers(runtime: Runtime, asked: list[Example], repeats: int) -> dict[str, object]:
    """Medians of seconds by stage, and the largest difference of gradients from those of `rollout`."""
    players = {gather: load_attacker(replace(CONFIG, gather=gather), ENGINE, runtime) for gather in ("rollout", "block", "update")}
    for player in players.values():
        disturb(player)
    found = {gather: gradients_of(player, asked, turn=1) for gather, player in players.items()}
    norm = found["rollout"].norm()
    difference = max(float((gradient - found["rollout"]).norm() / norm) for gradient in found.values())
    stages: dict[str, list[dict[str, float]]] = {gather: [] for gather in players}
    for turn in range(repeats + 1):
        for gather, player in players.items():
            runtime.barrier()
            seconds = step(player, asked, turn)
            stages[gather] += [seconds] if turn else []
    assert difference < TOLERANCE, difference
    medians = {gather: {stage: statistics.median(s[stage] for s in times) for stage in times[0]} for gather, times in stages.items()}
    return {"seconds": medians, "gradient_difference": difference, "raw": stages}


def shapes(runtime: Runtime, asked: list[Example]) -> dict[str, dict[int, float]]:
    """Largest |replayed - recorded log-prob| by precision and (sample, step) pairs in a micro-batch; a rollout's batch has `GROUP`."""
    made: dict[str, dict[int, float]] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        attacker = load_attacker(CONFIG, replace(ENGINE, precision=name), replace(runtime, dtype=dtype))
        disturb(attacker)
        made[name] = {pairs: mismatch(changed(attacker, microbatch=pairs), asked) for pairs in (1, 2, GROUP, 3 * GROUP)}
    return made


def mismatch(attacker: Attacker, asked: list[Example]) -> float:
    groups = rollout(attacker, asked, seed=0, round=1, step=0)
    return update(attacker, [rewarded(group) for group in groups])["logp_mismatch"]


if __name__ == "__main__":
    main()
