"""The small Attacker: Qwen-Image-Edit's own classes taught to edit, then cold-started on implanted distractors (MATH.md section 6).

Shapes: B batch, L prompt tokens, H width of the text encoder, 64 packed tokens of 64 channels per picture.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from aot_fast.bootstrap.answers import right_answers
from aot_fast.bootstrap.edits import (
    LATENT_SIDE,
    EditPool,
    decode_tokens,
    encode_prompts,
    encode_reference,
    implanted_pairs,
    instructed_pairs,
    load_pool,
    to_images,
)
from aot_fast.bootstrap.folders import IMAGE_PX, scheduler
from aot_fast.bootstrap.integrity import box_integrity
from aot_fast.bootstrap.rows import pictures_of
from aot_fast.bootstrap.training import Plan, train
from aot_fast.data.audit import Audit, audit
from aot_fast.data.implant import matches
from aot_fast.data.scenes import Scene, make_question
from aot_fast.data.schema import Question, edit_prompt

CONFIG = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 128,
    "axes_dims_rope": (8, 12, 12),
}
BASE_PLAN = Plan(
    steps=3200,
    lr=1e-3,
    muon_lr=0.01,
    plain=("_mod", "norm_out", "proj_out", "img_in", "txt_in", "time_text"),
    warmup_steps=50,
    ema_decay=0.998,
    betas=(0.9, 0.99),
    save_every=250,
)
"""Instructed edits: what to draw is said. After these steps the asked colour comes in 65 % and colour and shape in 17 %: still few."""
PLAN = replace(BASE_PLAN, steps=1800)
"""The cold start."""
BATCH = 32
NUM_STEPS = 10
"""Denoising steps at which edits are measured."""
SIGMA_SPREAD = 1.4
"""Deviation of the logit of sigma: at 1, the noise levels at which an edit decides what to draw (over 0.9) make up 4 % of the steps."""
CHANGED_WEIGHT = 4.0
"""An edit changes one token in twelve; which ones can be told from the reference, so the weight hardly shifts what is learned."""
CHANGED_FROM = 0.05
"""Mean square, in deviations of the latents."""
CHANGE = 0.06
"""A 8-px cell counts as changed when its mean absolute difference is over this; the codec's own error stays under 0.03."""


def shift_mu(num_tokens: int) -> float:
    """The scheduler's exponential shift for a picture of that many packed tokens."""
    config = scheduler().config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return config.base_shift + slope * (num_tokens - config.base_image_seq_len)


def predict_velocity(
    transformer: QwenImageTransformer2DModel, x: Tensor, sigma: Tensor, reference: Tensor, embeds: Tensor, mask: Tensor
) -> Tensor:
    """Velocity [B, 64, 64] at x, with the reference's tokens appended as the edit pipeline appends them."""
    tokens, side = x.shape[1], LATENT_SIDE // 2
    out = transformer(
        hidden_states=torch.cat([x, reference], 1),
        timestep=sigma,
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=mask,
        img_shapes=[[(1, side, side), (1, side, side)]] * len(x),
        return_dict=False,
    )[0]
    return out[:, :tokens]


def flow_matching_loss(transformer: QwenImageTransformer2DModel, pool: EditPool, batch: int, generator: torch.Generator) -> Tensor:
    """mean |v(x_s, s) - (e - x0)|^2 with s logit-normal, shifted as at sampling; tokens that the edit changes weigh `CHANGED_WEIGHT`."""
    rows = torch.randint(len(pool.reference), (batch,), generator=generator)
    x0, reference, embeds, mask = pool.target[rows].float(), pool.reference[rows].float(), pool.embeds[rows].float(), pool.mask[rows]
    longest = int(mask.sum(1).max())
    odds = math.exp(shift_mu(x0.shape[1])) * torch.exp(SIGMA_SPREAD * torch.randn(batch, generator=generator))
    sigma = odds / (1 + odds)
    noise = torch.randn(x0.shape, generator=generator)
    x = torch.lerp(x0, noise, sigma[:, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        velocity = predict_velocity(transformer, x, sigma, reference, embeds[:, :longest], mask[:, :longest])
    changed = ((x0 - reference).square().mean(-1) > CHANGED_FROM).float()
    weight = 1 + (CHANGED_WEIGHT - 1) * changed
    return ((velocity.float() - noise + x0).square().mean(-1) * weight).sum() / weight.sum()


@torch.no_grad()
def sample_edits(
    transformer: QwenImageTransformer2DModel, reference: Tensor, embeds: Tensor, mask: Tensor, num_steps: int, generator: torch.Generator
) -> Tensor:
    """Euler steps of the ODE from noise to packed latents [B, 64, 64]."""
    schedule = scheduler()
    schedule.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=shift_mu(reference.shape[1]))
    x = torch.randn(reference.shape, generator=generator)
    for sigma, following in zip(schedule.sigmas[:-1], schedule.sigmas[1:]):
        x = x + (following - sigma) * predict_velocity(transformer, x, sigma.expand(len(x)), reference, embeds, mask)
    return x


def train_editor(
    transformer: QwenImageTransformer2DModel, pool: EditPool, folder: Path, plan: Plan, stop_at: int | None = None
) -> QwenImageTransformer2DModel:
    """Flow matching on a pool of pairs, or on from the state in `folder`."""

    def batch_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        # In a process of its own, it must not outlive a killed parent: the resumed run would find two writers.
        if (parent := multiprocessing.parent_process()) and not parent.is_alive():
            raise SystemExit("the bootstrap that started this training is gone")
        return flow_matching_loss(transformer, pool, BATCH, generator), {}

    return train(transformer, batch_loss, plan, folder, stop_at)


def train_attacker(
    vae: AutoencoderKLQwenImage,
    encoder: Qwen2_5_VLForConditionalGeneration,
    folder: Path,
    plans: tuple[Plan, Plan] = (BASE_PLAN, PLAN),
    num_pairs: int = 4000,
    stop_at: int | None = None,
) -> QwenImageTransformer2DModel:
    """Editor, then Attacker, from scratch or from the states in `folder`; `folder/base/model` keeps the editor before its cold start."""
    base, cold = plans
    torch.manual_seed(base.seed)
    transformer = QwenImageTransformer2DModel(**CONFIG)
    pool = load_pool(vae, encoder, instructed_pairs("bootstrap", num_pairs, base.seed), folder / "base" / "pool.pt")
    train_editor(transformer, pool, folder / "base", base)
    transformer.save_pretrained(folder / "base" / "model")
    pool = load_pool(vae, encoder, implanted_pairs("bootstrap", num_pairs, cold.seed), folder / "pool.pt")
    return train_editor(transformer, pool, folder, cold, stop_at)


def changed_outside(before: Tensor, after: Tensor, questions: Sequence[Question]) -> Tensor:
    """Whether each picture [N, 3, 64, 64] in [0, 1] changed in some 8-px cell off its target boxes."""
    cells = F.avg_pool2d((before - after).abs().mean(1, keepdim=True), 8)[:, 0]
    for cell_map, question in zip(cells, questions):
        for x, y, w, h in question.target_boxes:
            cell_map[int(y) // 8 : int(y + h - 1) // 8 + 1, int(x) // 8 : int(x + w - 1) // 8 + 1] = 0
    return cells.flatten(1).max(1).values > CHANGE


@dataclass(frozen=True)
class Sampled:
    """Questions with their pictures, uint8 [N, 3, 64, 64]: clean, through the codec, and edited by the model under test."""

    questions: tuple[Question, ...]
    clean: Tensor
    round_trip: Tensor
    edited: Tensor

    def integrity(self) -> Tensor:
        """q of each edit, [N]."""
        pairs = zip(self.clean.float() / 255, self.edited.float() / 255, self.questions)
        return torch.tensor([min(box_integrity(before, after, question.target_boxes)) for before, after, question in pairs])


@torch.no_grad()
def sample_split(
    transformer: QwenImageTransformer2DModel,
    vae: AutoencoderKLQwenImage,
    encoder: Qwen2_5_VLForConditionalGeneration,
    split: str,
    num_questions: int,
    num_steps: int = NUM_STEPS,
) -> Sampled:
    """One edit of each of the first questions of a split, asked for as the game asks."""
    scenes, questions = zip(*(make_question(split, index, IMAGE_PX) for index in range(num_questions)))
    pictures = pictures_of(scenes)
    reference = encode_reference(vae, pictures)
    embeds, mask = encode_prompts(encoder, to_images(pictures), [edit_prompt(question.question) for question in questions])
    generator = torch.Generator().manual_seed(0)
    parts = zip(*(tensor.split(100) for tensor in (reference, embeds, mask)))
    latents = torch.cat([sample_edits(transformer, *part, num_steps, generator) for part in parts])
    return Sampled(questions, pictures, decode_tokens(vae, reference), decode_tokens(vae, latents))


def editing_metrics(made: Sampled) -> dict[str, float]:
    """What an editor does to the pictures: to the targets, elsewhere, and to the answer, by the scene graph's audit.

    `second_instance` is the untrained editor's failure (AOT_FACTS): an object was added that answers to a target's name.
    """
    q = made.integrity()
    after = zip(made.questions, to_images(made.clean), to_images(made.edited))
    audits = [audit(question, before, edit) for question, before, edit in after]
    valid = torch.tensor([found.valid for found in audits])
    second = torch.tensor([_second_instance(question, found) for question, found in zip(made.questions, audits)])
    changed = changed_outside(made.round_trip.float() / 255, made.edited.float() / 255, made.questions)
    return {
        "q_median": q.median().item(),
        "q_p5": q.quantile(0.05).item(),
        "q_over_0.6": (q > 0.6).float().mean().item(),
        "changed_elsewhere": changed.float().mean().item(),
        "second_instance": second.float().mean().item(),
        "answer_still_true": valid.float().mean().item(),
        "answer_still_true_q_over_0.6": valid[q > 0.6].float().mean().item(),
        "num_questions": len(q),
    } | {f"made_{kind}": share for kind, share in _shares([found.kind for found in audits]).items()}


def _second_instance(question: Question, found: Audit) -> bool:
    scene = Scene.from_json(question.scene)
    before, after = (
        [sum(matches(item, name) for item in items) for name in question.target_names] for items in (scene.objects, found.objects)
    )
    return any(more > less for less, more in zip(before, after))


def _shares(kinds: Sequence[str]) -> dict[str, float]:
    return {kind: kinds.count(kind) / len(kinds) for kind in sorted(set(kinds))}


def attack_metrics(made: Sampled, defender: Qwen2_5_VLForConditionalGeneration) -> dict[str, float]:
    """What the Defender makes of the edits, over the questions that it answers rightly on the codec's round trip."""
    solvable = right_answers(defender, to_images(made.round_trip), made.questions)
    fooled = ~right_answers(defender, to_images(made.edited), made.questions)
    return {
        "defender_round_trip_accuracy": solvable.float().mean().item(),
        "attack_success": (fooled[solvable & (made.integrity() > 0.6)]).float().mean().item(),
    }


def contact_sheet(rows: Sequence[Tensor], columns: int = 12, zoom: int = 2) -> Image.Image:
    """Pictures [N, 3, 64, 64] of the same scene under one another, the first 36."""
    count = min(columns * 3, len(rows[0]))
    side = IMAGE_PX * zoom + 4
    sheet = Image.new("RGB", (columns * side, -(-count // columns) * len(rows) * side), "white")
    for k in range(count):
        for r, row in enumerate(rows):
            image = to_images(row[k : k + 1])[0].resize((IMAGE_PX * zoom,) * 2, Image.Resampling.NEAREST)
            sheet.paste(image, (k % columns * side, (k // columns * len(rows) + r) * side))
    return sheet
