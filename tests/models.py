"""Small players with random weights in the real folder layouts, and questions about rendered scenes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from aot_fast.bootstrap.folders import build_tokenizer, save_defender
from aot_fast.bootstrap.model import defender_config
from aot_fast.config import DefenderConfig, OptimizerConfig
from aot_fast.data.scenes import make_question, render
from aot_fast.data.schema import Example


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
