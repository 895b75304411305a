"""Whole training steps of TRL's GRPOTrainer on a CPU, timed, and TRL's own loss on recorded rollouts.

Reaches into private methods of TRL, written for 1.16. Runs without torchvision.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset
from PIL.Image import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback, ProcessorMixin, Qwen2_5_VLProcessor, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig, GRPOTrainer

DAPO = {"loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": 0.28, "temperature": 1.0, "num_iterations": 1}
CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
PLAIN = {"logging_strategy": "no", "save_strategy": "no", "report_to": [], "disable_tqdm": True, "lr_scheduler_type": "constant"}


@dataclass(frozen=True)
class Prompt:
    image: Image
    text: str
    """The user's turn, after the image."""


@dataclass(frozen=True)
class Rollout:
    """A recorded response. old_logp: of the sampling policy; None is a ratio of 1, and a loss that does not depend on the weights."""

    prompt: Prompt
    ids: Sequence[int]
    advantage: float
    old_logp: Sequence[float] | None = None


@dataclass(frozen=True)
class StepTime:
    """One optimizer step with the fetch of its data. generation: seconds inside `generate`. A prompt's tokens count once a response."""

    seconds: float
    cpu_seconds: float
    generation: float
    prompt_tokens: int
    image_tokens: int


class StillProcessor(Qwen2_5_VLProcessor):
    """Without the video processor, which is what needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def build_processor(folder: Path, **pixels: int) -> StillProcessor:
    """The processor of a Qwen2.5-VL folder; pixels: min_pixels, max_pixels. Pads on the left: TRL does not see to that itself."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return StillProcessor(Qwen2VLImageProcessorPil.from_pretrained(folder, **pixels), tokenizer, chat_template=tokenizer.chat_template)


def even_share(completion_ids: Sequence[Sequence[int]], **_) -> list[float]:
    """A reward of the tokens alone: the share of even ids."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


def build_trainer(
    model: PreTrainedModel,
    processor: StillProcessor,
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    group_size: int,
    response_tokens: int,
    prompts_per_step: int,
    microbatch: int | None = None,
    lr: float = 1e-6,
    banned_ids: Sequence[int] = (),
) -> GRPOTrainer:
    """On-policy DAPO without a KL; every response has exactly `response_tokens`. The trainer trains `model` itself.

    microbatch: rows of a forward and backward, None for all of a step; generation always takes all. folder: TRL's, stays empty.
    banned_ids: never sampled, besides the image token, which TRL leaves out by itself.
    """
    rows = prompts_per_step * group_size
    microbatch = microbatch or rows
    # TRL cuts a response behind its first end token: none may come.
    generation = {"min_new_tokens": response_tokens, "suppress_tokens": sorted({processor.image_token_id, *banned_ids})}
    sizes = {"per_device_train_batch_size": microbatch, "gradient_accumulation_steps": rows // microbatch, "num_generations": group_size}
    lengths = {"max_completion_length": response_tokens, "generation_kwargs": generation}
    config = GRPOConfig(str(folder), learning_rate=lr, shuffle_dataset=False, **DAPO, **CPU, **PLAIN, **sizes, **lengths)
    trainer = GRPOTrainer(model, even_share, config, Dataset.from_list([_row(p) for p in prompts]), processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _row(prompt: Prompt) -> dict:
    return {"prompt": [{"role": "user", "content": prompt.text}], "image": prompt.image}


def train_steps(trainer: GRPOTrainer, steps: int = 5, warmup: int = 1) -> list[StepTime]:
    """Generate, score, loss, backward, optimizer: `steps` of them after `warmup` untimed ones. Raises on a response of another length."""
    generate, image_token_id = trainer._generate_single_turn, trainer.processing_class.image_token_id
    marks, counted = [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            marks.append((time.perf_counter(), time.process_time()))

        on_step_end = on_train_begin

    def timed(prompt_ids, *args, **options):
        start = time.perf_counter()
        out = generate(prompt_ids, *args, **options)
        seconds, lengths = time.perf_counter() - start, {len(ids) for ids in out[0]}
        if lengths != {trainer.max_completion_length}:
            raise RuntimeError(f"responses of {sorted(lengths)} tokens, expected {trainer.max_completion_length}")
        counted.append((seconds, sum(map(len, prompt_ids)), sum(list(ids).count(image_token_id) for ids in prompt_ids)))
        return out

    trainer.add_callback(Clock)
    trainer.args.max_steps = warmup + steps
    with patch.object(trainer, "_generate_single_turn", timed):
        trainer.train()
    trainer.remove_callback(Clock)
    return [StepTime(end[0] - start[0], end[1] - start[1], *counts) for start, end, counts in zip(marks, marks[1:], counted)][warmup:]


def recorded_loss(trainer: GRPOTrainer, rollouts: Sequence[Rollout]) -> tuple[float, float]:
    """TRL's loss on `rollouts`, whole groups in one micro-batch, and the norm of its gradients, which stay on `trainer.model`."""
    trainer.model.train().zero_grad()
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    with patch.object(trainer, "_generate_single_turn", lambda *_, **__: ([list(r.ids) for r in rollouts], None)):
        inputs = trainer._generate_and_score_completions([_row(r.prompt) for r in rollouts])
    inputs["advantages"] = torch.tensor([r.advantage for r in rollouts])
    if rollouts[0].old_logp is not None:
        inputs["old_per_token_logps"] = pad_sequence([torch.tensor(r.old_logp) for r in rollouts], batch_first=True)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None]).item()
