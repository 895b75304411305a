"""What a step of the Attacker cost: pictures, floating-point operations (flops.py) of the transformer, seconds by stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from aot_fast.attacker import flops
from aot_fast.defender.flops import mfu
from aot_fast.metrics import reduce_over_ranks

if TYPE_CHECKING:
    from aot_fast.attacker.model import Attacker
    from aot_fast.attacker.rollout import Group


class Stopwatch:
    """Seconds between marks. On a GPU they are events, and nothing waits before `seconds` is asked for."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, object]] = []
        self.mark("")

    def mark(self, name: str) -> None:
        """`name` ends here."""
        if self._cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self._marks.append((name, now))

    def seconds(self) -> dict[str, float]:
        """Of each stage."""
        if self._cuda:
            self._marks[-1][1].synchronize()
            return {name: start.elapsed_time(end) / 1e3 for (_, start), (name, end) in zip(self._marks, self._marks[1:])}
        return {name: end - start for (_, start), (name, end) in zip(self._marks, self._marks[1:])}


def counters(attacker: Attacker, groups: Sequence[Group], update_seconds: float, rollout_share: float = 1.0) -> dict[str, float]:
    """Of all ranks, for their groups of one optimizer step; seconds are the slowest rank's. `mfu` where the card's peak is known.

    rollout_share: of the last rollout's seconds, where several optimizer steps train on it.

    A collective. Operations are those that were needed: recomputation is left out. images_per_s leaves out what rewards take.
    """
    runtime, settings = attacker.runtime, attacker.player.module.config
    lora = bool(attacker.config.lora.rank)
    sampled = trained = 0.0
    for group in groups:
        one = flops.forward_flops(settings, tokens_of(group))
        sampled += one.total * (len(group.samples) * (group.num_steps - group.shared_steps) + group.shared_steps)
        if attacker.config.variant == "nft":  # which trains noised levels of what came out, without guidance
            steps = len(group.samples) * attacker.config.window
            trained += steps * flops.training_flops(flops.forward_flops(settings, tokens_of(group)._replace(negative=0)), lora)
        else:
            steps = sum(len(sample.steps) for sample in group.samples)
            trained += steps * (flops.training_flops(one, lora) + (one.total if attacker.config.beta else 0))
    stages = {f"{name}/seconds": rollout_share * value for name, value in attacker.stopwatch.seconds().items()} | {
        "update/seconds": update_seconds
    }
    sums = {"rollout/tflop": sampled / 1e12, "update/tflop": trained / 1e12, "images": float(sum(len(g.samples) for g in groups))}
    named = {f"sum/{name}": torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
    named |= {f"max/{name}": torch.tensor(value, dtype=torch.float64) for name, value in stages.items()}
    made = {name.split("/", 1)[1]: value for name, value in reduce_over_ranks(runtime, named).items()}
    card = torch.cuda.get_device_name(runtime.device) if runtime.device.type == "cuda" else "CPU"
    for part, seconds in (("rollout", made["denoise/seconds"]), ("update", made["update/seconds"])):
        share = mfu(made[f"{part}/tflop"] * 1e12 / runtime.world, max(seconds, 1e-9), card)
        made |= {} if share is None else {f"{part}/mfu": share}
    seconds = sum(made[f"{stage}/seconds"] for stage in ("encode", "denoise", "decode", "update"))
    return made | {"images_per_s": made.pop("images") / max(seconds, 1e-9)}


def tokens_of(group: Group) -> flops.Tokens:
    encoding = group.encoding
    target = encoding.size[0] * encoding.size[1]
    return flops.Tokens(target, len(encoding.reference), len(encoding.prompt), 0 if encoding.negative is None else len(encoding.negative))
