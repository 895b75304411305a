"""One update on recorded groups, whose gradient is kept: run alone in the test process, or as a script under torchrun.

python -m tests.defender.recorded FOLDER ORDER OUT CHANGES: the changed settings as JSON, and "prompts" of make_prompts.
"""

from __future__ import annotations

import json
import random
import sys
from functools import lru_cache
from pathlib import Path

import torch

from aot_fast.config import EngineConfig, RunConfig
from aot_fast.defender import dapo
from aot_fast.defender.drawing import Response, Sampling
from aot_fast.defender.groups import Group
from aot_fast.defender.model import Defender, load_defender, load_frozen
from aot_fast.defender.prompt import Prompt, chat_text, encode_chat
from aot_fast.defender.prompts import Prompts
from aot_fast.engine import Runtime, close_runtime, open_runtime
from tests.models import answers_to, defender_config_of, scene_examples

NUM_EXAMPLES = 3
REWARDS = ((1.0, 0.0, 0.8, 0.0), (0.0, 0.0, 1.0, 1.0), (0.8, 1.0, 0.0, 0.8))


@lru_cache
def _answers(folder: Path, runtime: Runtime) -> list[list[Response]]:
    defender = load_frozen(folder, defender_config_of(folder), runtime)
    return answers_to(defender, scene_examples(NUM_EXAMPLES), range(NUM_EXAMPLES), Sampling(4, 1.0, 1.0, 6))


def recorded_groups(folder: Path, runtime: Runtime, version: int = 0) -> list[Group]:
    """Answers of the untrained Defender of ragged lengths, with fixed rewards. `version` -1: as if sampled by an earlier policy."""
    examples = scene_examples(NUM_EXAMPLES)
    groups = []
    for i, responses in enumerate(_answers(folder, runtime)):
        short = []
        for j, r in enumerate(responses):
            n = 1 + (i + 2 * j) % len(r.ids)
            # An earlier policy's log-probs differ from today's by enough to reach the clip on both sides.
            drift = 0.0 if version == 0 else 0.4 * (-1) ** (i + j)
            short.append(type(r)(r.ids[:n], r.logp[:n] + drift, r.text, r.truncated))
        rewards = REWARDS[i]
        groups.append(Group(i, examples[i].key, tuple(short), rewards, tuple(x > 0 for x in rewards), version, 100 + 10 * i, ((1, 8, 8),)))
    return groups


class Encoded(list[Prompt]):
    """Prompts that are there already."""

    def prefetch(self, indices) -> None:
        pass


def make_prompts(kind: str, defender: Defender) -> Prompts | Encoded:
    """NUM_EXAMPLES prompts. scenes: questions about a picture each. mixed: two pictures, none, and one. text: no pictures at all."""
    examples = scene_examples(NUM_EXAMPLES)
    if kind == "scenes":
        return Prompts(defender, examples)
    numbers = {"mixed": (2, 0, 1), "text": (0, 0, 0)}[kind]
    chats = [(chat_text(defender, e.question.question, n), [e.image] * n, e.key, "test") for e, n in zip(examples, numbers)]
    return Encoded(encode_chat(defender, *chat) for chat in chats)


def gradient_of_update(folder: Path, order: int, runtime: Runtime, version: int = 0, prompts: str = "scenes", **changes):
    """(metrics, {name: whole gradient}) of one update with the groups shuffled by `order`."""
    from deepspeed.utils import safe_get_full_grad

    groups = recorded_groups(folder, runtime, version)
    random.Random(order).shuffle(groups)
    defender = load_defender(defender_config_of(folder, **changes), EngineConfig(timeout_s=60), runtime)
    player, gradients = defender.player, {}
    apply = player.step

    def keep_gradients(healthy):
        for name, parameter in player.module.named_parameters():
            if parameter.requires_grad:
                gradients[name] = safe_get_full_grad(parameter).float().clone()
        return apply(healthy)

    player.step = keep_gradients
    metrics = dapo.update(defender, make_prompts(prompts, defender), groups)
    return metrics, gradients


@lru_cache
def reference_gradient(folder: Path, runtime: Runtime, prompts: str = "scenes"):
    """What the other ways of batching are compared with: the plain path, micro-batches of 3 in the order of drawing."""
    return gradient_of_update(folder, 0, runtime, version=-1, prompts=prompts, shared_prefix=False, microbatch=3)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest norm-relative difference over the parameters; those whose gradient is 1e-6 of the largest are noise and count absolutely."""
    floor = 1e-6 * max(g.norm() for g in b.values())
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp_min(floor)) for name in b)


if __name__ == "__main__":
    folder, order, out, changes = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
    runtime = open_runtime(EngineConfig(timeout_s=60), RunConfig(threads=1))
    metrics, gradients = gradient_of_update(folder, order, runtime, version=-1, **changes)
    if runtime.rank == 0:
        torch.save((metrics, gradients), out)
    runtime.barrier()
    close_runtime()
