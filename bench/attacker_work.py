"""What the Attacker's benchmarks share: questions about coloured tiles, rewards, a fresh memory, the result's file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from aot_fast.attacker.encoding_cache import Encodings
from aot_fast.attacker.flow_grpo import ScoredGroup
from aot_fast.attacker.model import Attacker
from aot_fast.attacker.rollout import Group
from aot_fast.data.schema import Example, Question, Verdict
from aot_fast.models import model_folder


def questions(count: int, side: int = 64) -> list[Example]:
    """About coloured tiles."""
    made = torch.Generator().manual_seed(0)
    tiles = torch.randint(0, 255, (count, 6, 6, 3), generator=made, dtype=torch.uint8)
    images = [Image.fromarray(t.numpy()).resize((side, side), Image.Resampling.NEAREST) for t in tiles]
    return [Example(Question(str(i), f"{i}.png", f"How many red circles are there? {i}", "0"), image) for i, image in enumerate(images)]


def rewarded(group: Group) -> ScoredGroup:
    """Rewards that differ inside the group."""
    rewards = [((7 * j) % 5) / 4 for j in range(len(group.edits))]
    return ScoredGroup(
        group, tuple(Verdict(e.example.question.id, "", 0, 1, (1.0,), 1.0, 1.0, r, (), r, True) for e, r in zip(group.edits, rewards))
    )


def forget(attacker: Attacker) -> None:
    """No encoding is known from a step before."""
    attacker.encodings = Encodings(attacker.config, model_folder(attacker.config.model, "", "model"), attacker.runtime.dtype)


def write(result: dict[str, object], path: Path | None) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
