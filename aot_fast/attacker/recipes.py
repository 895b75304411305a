"""What others published, in our settings: `python -m aot_fast.attacker.recipes NAME` prints them as arguments of `aot-fast run`.

Only what their files say and our settings have; learning rates, batch sizes and models are theirs to look up. DanceGRPO trains a random
60 % of its steps, where ours are consecutive: a window of 9 of 16 is as many.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Fields of AttackerConfig, and where they come from."""

    source: str
    settings: Mapping[str, Any]


_EDIT = {
    "num_steps": 10,
    "guidance": 4.0,
    "group_size": 16,
    "steps_per_rollout": 2,  # gradient_accumulation_steps = num_batches_per_epoch // 2
    "advantage_std": "batch",
    "shared_noise": False,
    "beta": 0.0,
}
_CPS = {"dynamics": "cps", "eta": 0.8, "clip": 1e-5, "window": 3, "advantage_std": "batch", "shared_noise": False, "beta": 0.0}
_FLUX = {"group_size": 12, "advantage_std": "group", "shared_noise": True, "guidance": 1.0, "clip": 1e-4, "adv_clip": 5.0, "beta": 0.0}
_FAST = {"dynamics": "flow_sde", "window_range": (0, 5)}

RECIPES = {
    "flow_grpo_edit": Recipe(
        "yifan123/flow_grpo 31c71b9, config/grpo.py: counting_qwenimage_edit (Qwen-Image-Edit; all but the last step)",
        {**_EDIT, "dynamics": "flow_sde", "eta": 1.0, "window": 9, "window_range": (0, 9), "clip": 1e-4},
    ),
    "flow_grpo_fast_edit": Recipe("the same: counting_qwenimage_edit_fast", {**_EDIT, **_FAST, "eta": 1.5, "window": 4, "clip": 1e-4}),
    "flow_grpo_fast_image": Recipe("the same: pickscore_qwenimage (Qwen-Image)", {**_EDIT, **_FAST, "eta": 1.2, "window": 2, "clip": 1e-4}),
    "cps": Recipe(
        "the same: pickscore_sd3_fast_nocfg (SD3.5; FlowCPS, arXiv 2509.05952)",
        {**_CPS, "num_steps": 10, "guidance": 1.0, "group_size": 18, "window_range": (0, 5)},
    ),
    "mixgrpo": Recipe(
        "MixGRPO (arXiv 2507.21802), scripts/finetune/finetune_flux_grpo_MixGRPO.sh (FLUX)",
        {
            "num_steps": 25,
            "dynamics": "flow_sde",
            "eta": 0.7,
            "window": 4,
            "window_range": (0, 24),
            "window_order": "slide",
            "window_stays": 25,
            **_FLUX,
        },
    ),
    "dance": Recipe(
        "DanceGRPO (arXiv 2505.07818), scripts/finetune/finetune_flux_grpo_8gpus.sh (FLUX)",
        {
            "num_steps": 16,
            "dynamics": "dance",
            "eta": 0.3,
            "window": 9,
            "window_range": (0, 15),
            **_FLUX,
        },
    ),
}


def arguments(name: str) -> list[str]:
    """A recipe as arguments of `aot-fast run`. Raises KeyError for an unknown name."""
    made = []
    for field, value in RECIPES[name].settings.items():
        shown = value if isinstance(value, str) else json.dumps(list(value) if isinstance(value, tuple) else value, separators=(",", ":"))
        made += [f"--attacker.{field}", shown]
    return made


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in RECIPES]
    if unknown or not names:
        raise SystemExit(f"recipes: given {', '.join(names) or 'none'}, expected some of {', '.join(RECIPES)}")
    for name in names:
        print(f"# {name}: {RECIPES[name].source}\n{' '.join(arguments(name))}")


if __name__ == "__main__":
    main(sys.argv[1:])
