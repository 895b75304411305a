"""Small players with random weights in the real folder layouts, and questions about rendered scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from aot_fast.bootstrap.folders import build_tokenizer, save_defender
from aot_fast.bootstrap.model import defender_config
from aot_fast.config import DefenderConfig, OptimizerConfig
from aot_fast.data.scenes import make_question, render
from aot_fast.data.schema import Example
from aot_fast.defender.drawing import Response, Sampling
from aot_fast.defender.model import Defender
from aot_fast.defender.prompt import encode
from aot_fast.defender.rollout import sample


def random_defender_folder(folder: Path, seed: int = 0) -> Path:
    """A Qwen2.5-VL folder. Weights are drawn wide, so that answers differ and log-probs are far from uniform."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(defender_config(build_tokenizer()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    save_defender(model, folder, torch.float32)
    return folder


def defender_config_of(folder: Path, **changes) -> DefenderConfig:
    """Settings of a quick Defender."""
    defaults = {
        "optimizer": OptimizerConfig(lr=1e-3),
        "max_response_tokens": 6,
        "group_size": 4,
        "prompts_per_step": 3,
        "rollout_batch": 8,
        "microbatch": 2,
    }
    return DefenderConfig(model=str(folder), **(defaults | changes))


def scene_examples(count: int, split: str = "train") -> list[Example]:
    """Questions with rendered pictures, of differing prompt lengths."""
    drawn = [make_question(split, index, 64) for index in range(count)]
    return [Example(question, render(scene, 64)) for scene, question in drawn]


def answers_to(defender: Defender, examples: Sequence[Example], seeds: Sequence[int], sampling: Sampling) -> list[list[Response]]:
    """A rollout on examples."""
    return sample(defender, (encode(defender, example) for example in examples), seeds, sampling)
