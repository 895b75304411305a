"""What a step of the Defender cost: tokens, floating-point operations, the share of the card's peak.

`tflop` is the work that was needed, each prompt and picture once (flops.py); `tflop_nominal` what the same answers cost when nothing is
shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from aot_fast.defender import flops
from aot_fast.defender.model import Defender

if TYPE_CHECKING:
    from aot_fast.defender.groups import Group


def shapes_of(groups: Sequence[Group], wanted: Sequence[bool]) -> list[flops.GroupShape]:
    """Of each group what is worked on: `wanted` says of every response whether it is."""
    flags, shapes = iter(wanted), []
    for group in groups:
        lengths = [len(r.ids) for r in group.responses if next(flags)]
        if lengths and group.prompt_tokens:
            shapes.append(flops.GroupShape.of(group.images, group.prompt_tokens, lengths))
    return shapes


def update_counters(defender: Defender, groups: Sequence[Group], wanted: Sequence[bool], seconds: float) -> dict[str, float]:
    """Of all ranks. `update/mfu` where the card's peak is known."""
    shapes = shapes_of(groups, wanted)
    how = {"train_vision": defender.config.train_vision, "lora": bool(defender.config.lora.rank)}
    needed, nominal = (flops.update_flops(defender.core.config, shapes, shared=s, **how).total for s in (True, False))
    tokens = sum(s.prompt + sum(s.responses) for s in shapes), sum(s.prompt * len(s.responses) + sum(s.responses) for s in shapes)
    return _counters("update", defender, needed, nominal, seconds) | {
        "update/tokens": float(tokens[0]),
        "update/tokens_nominal": float(tokens[1]),
    }


def rollout_counters(defender: Defender, groups: Sequence[Group], seconds: float) -> dict[str, float]:
    """Of all ranks; tokens are those of the answers."""
    shapes = shapes_of(groups, [True] * sum(len(g.responses) for g in groups))
    needed, nominal = (flops.rollout_flops(defender.core.config, shapes, shared=s).total for s in (True, False))
    tokens = sum(n for s in shapes for n in s.responses)
    return _counters("rollout", defender, needed, nominal, seconds) | {
        "rollout/tokens": float(tokens),
        "rollout/tokens_per_s": tokens / max(1e-9, seconds),
    }


def _counters(part: str, defender: Defender, needed: int, nominal: int, seconds: float) -> dict[str, float]:
    values = {f"{part}/tflop": needed / 1e12, f"{part}/tflop_nominal": nominal / 1e12, f"{part}/seconds": seconds}
    device = defender.runtime.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    share = flops.mfu(needed / defender.runtime.world, seconds, name)
    return values | ({} if share is None else {f"{part}/mfu": share})
