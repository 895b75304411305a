"""`aot-fast doctor`: what this machine has, and whether the configured players can play at all."""

from __future__ import annotations

import os
import shutil

import torch

from aot_fast.attacker.encoding import roundtrip
from aot_fast.attacker.integrity import integrity
from aot_fast.attacker.model import Attacker, load_attacker
from aot_fast.config import Config
from aot_fast.data.scenes import make_question, render
from aot_fast.data.schema import Example
from aot_fast.defender.answers import answerer
from aot_fast.defender.model import load_frozen
from aot_fast.engine import close_runtime, open_runtime
from aot_fast.evaluation.matrix import integrity as summary_of
from aot_fast.evaluation.summary import versions
from aot_fast.evaluation.tables import Edit
from aot_fast.kernels import native
from aot_fast.kernels.dispatch import HAS_TRITON
from aot_fast.models import model_folder

NUM_SCENES = 50
OPTIONAL = ("flash_attn", "xformers", "liger_kernel", "wandb", "trackio")


def examine(config: Config) -> int:
    """Print the findings; returns 0 when the game can be played, 1 when something stands in its way."""
    from importlib.util import find_spec

    runtime = open_runtime(config.engine, config.run)
    print("versions   " + "  ".join(f"{name} {version}" for name, version in versions().items()))
    print("optional   " + "  ".join(f"{name} {'yes' if find_spec(name) else 'no'}" for name in OPTIONAL))
    print(f"device     {device_name()}, compute {str(runtime.dtype).removeprefix('torch.')}, {os.cpu_count()} CPU cores")
    print(f"disk       {shutil.disk_usage('.').free / 2**30:.0f} GiB free here")
    print(f"operators  kernels.backend {config.kernels.backend}: {operators(config, runtime.device)}")
    scenes = [example(i) for i in range(NUM_SCENES)]
    problems = [*codec(load_attacker(config.attacker, config.engine, runtime), scenes, config), *clean_accuracy(config, runtime, scenes)]
    for problem in problems:
        print(f"problem    {problem}")
    close_runtime()
    return 1 if problems else 0


def operators(config: Config, device: torch.device) -> str:
    if config.kernels.backend == "reference":
        return "plain torch, all logits at once"
    if config.kernels.backend == "triton" or (device.type == "cuda" and HAS_TRITON):
        return "Triton"
    return native.description()


def device_name() -> str:
    if not torch.cuda.is_available():
        return "CPU (no CUDA device)"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{len(names)} x {names[0]}, {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB each"


def example(index: int) -> Example:
    """A scene that no training uses; not of the split that figures are published on."""
    scene, question = make_question("validation", index, 64)
    return Example(question, render(scene, 64))


def codec(attacker: Attacker, scenes: list[Example], config: Config) -> list[str]:
    """The VAE's round trip must keep the targets: what the codec alone breaks would count as an attack (MATH.md section 5)."""
    pictures = roundtrip(attacker, scenes)
    values = [integrity(s.image, p, s.question.target_boxes, config.reward.pad) for s, p in zip(scenes, pictures)]
    floor = summary_of({s.question.id: Edit(s.question.id, min(v), v) for s, v in zip(scenes, values)})
    print(f"codec      round trip of {len(scenes)} scenes: q median {floor.median:.3f}, 5th percentile {floor.p5:.3f}")
    if floor.p5 < config.reward.q_high:
        return [
            f"the codec's 5th percentile {floor.p5:.3f} is under reward.q_high = {config.reward.q_high}: use a better VAE, or lower q_high"
        ]
    return []


def clean_accuracy(config: Config, runtime, scenes: list[Example]) -> list[str]:
    folder = model_folder(config.defender.model, config.defender.revision, "defender.model")
    defender = load_frozen(folder, config.defender, runtime)
    with defender.whole():
        right = sum(answer.correct for (answer,) in answerer(defender)(scenes, 1, 0.0, [0] * len(scenes)))
    print(f"defender   {right} of {len(scenes)} scenes answered rightly")
    return [] if right else ["the Defender answers no scene rightly: in the small world there would be nothing to attack"]
