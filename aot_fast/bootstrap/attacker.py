"""The small Attacker's cold start: flow matching on implanted distractors with Qwen-Image-Edit's own classes (MATH.md section 6).

Shapes: N questions, K edits of each, B batch, L prompt tokens, H width of the text encoder, 64 packed tokens of 64 channels per picture.
"""

from __future__ import annotations

import math
import multiprocessing
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from aot_fast.bootstrap.defender import chat_inputs, picture_of, right_answers
from aot_fast.bootstrap.folders import EDIT_PREFIX_TOKENS, EDIT_TEMPLATE, IMAGE_PX, build_tokenizer, scheduler
from aot_fast.bootstrap.integrity import box_integrity
from aot_fast.bootstrap.training import Plan, save_atomically, train
from aot_fast.bootstrap.vae import decode_latents, encode_pictures
from aot_fast.data.implant import implant
from aot_fast.data.scenes import make_question, render
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
PLAN = Plan(steps=7000, lr=1e-3, warmup_steps=200, ema_decay=0.999, seed=3, save_every=250)
BATCH = 32
EDITS_PER_QUESTION = 2
LATENT_SIDE = IMAGE_PX // 4
CHANGE = 0.06
"""A 8-px cell counts as changed when its mean absolute difference is over this; the codec's own error stays under 0.03."""


def pack_latents(latents_NCHW: Tensor) -> Tensor:
    """[N, 16, H, W] -> [N, H/2 * W/2, 64], as the edit pipeline packs 2 x 2 latents into a token."""
    n, c, h, w = latents_NCHW.shape
    return latents_NCHW.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def unpack_latents(tokens: Tensor, side: int = LATENT_SIDE) -> Tensor:
    """Inverse of `pack_latents` for square pictures."""
    n, _, c = tokens.shape
    return tokens.view(n, side // 2, side // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c // 4, side, side)


def latent_statistics(vae: AutoencoderKLQwenImage) -> tuple[Tensor, Tensor]:
    """Mean and deviation, [1, 16, 1, 1]."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std


def encode_reference(vae: AutoencoderKLQwenImage, pictures: Tensor) -> Tensor:
    """uint8 [N, 3, 64, 64] -> normalised, packed latents [N, 64, 64]."""
    mean, std = latent_statistics(vae)
    return pack_latents((encode_pictures(vae, pictures) - mean) / std)


def decode_tokens(vae: AutoencoderKLQwenImage, tokens: Tensor) -> Tensor:
    """Inverse of `encode_reference`: uint8 [N, 3, 64, 64]."""
    mean, std = latent_statistics(vae)
    return decode_latents(vae, unpack_latents(tokens) * std + mean)


@torch.no_grad()
def encode_prompts(
    encoder: Qwen2_5_VLForConditionalGeneration, images: Sequence[Image.Image], prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Prompt embeddings [N, L, H] and their mask, through the pipeline's template, its first 64 tokens dropped."""
    tokenizer, embeds, masks = build_tokenizer(), [], []
    for start in range(0, len(prompts), 200):
        part = slice(start, start + 200)
        texts = [EDIT_TEMPLATE.format(prompt) for prompt in prompts[part]]
        inputs = chat_inputs(tokenizer, images[part], texts, encoder.config.image_token_id, padding_side="right")
        embeds.append(encoder.model(**inputs).last_hidden_state[:, EDIT_PREFIX_TOKENS:])
        masks.append(inputs["attention_mask"][:, EDIT_PREFIX_TOKENS:].bool())
    length = max(mask.shape[1] for mask in masks)
    embeds = [F.pad(part, (0, 0, 0, length - part.shape[1])) for part in embeds]
    masks = [F.pad(part, (0, length - part.shape[1])) for part in masks]
    return torch.cat(embeds), torch.cat(masks)


@dataclass(frozen=True)
class EditPool:
    """Encoded pairs, in half precision: encoding them again at every step would double the time."""

    reference: Tensor
    """[N, 64, 64]"""
    target: Tensor
    """[N, K, 64, 64]"""
    embeds: Tensor
    """[N, L, H]"""
    mask: Tensor
    """[N, L]"""


def draw_edits(split: str, first: int, count: int, seed: int) -> tuple[list[Question], Tensor, Tensor]:
    """Questions, their pictures [n, 3, 64, 64] and K implanted edits of each [n, K, 3, 64, 64]."""
    questions, pictures, edits = [], [], []
    for index in range(first, first + count):
        scene, question = make_question(split, index, IMAGE_PX)
        rng = random.Random(f"implant {seed} {index}")
        questions.append(question)
        pictures.append(picture_of(scene))
        edits.append(torch.stack([picture_of(implant(scene, question, rng, IMAGE_PX).scene) for _ in range(EDITS_PER_QUESTION)]))
    return questions, torch.stack(pictures), torch.stack(edits)


def _to_images(pictures: Tensor) -> list[Image.Image]:
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]


def encode_pairs(vae: AutoencoderKLQwenImage, num_questions: int, seed: int, path: Path) -> tuple[Tensor, Tensor]:
    """Latents of the bootstrap split's pairs, [N, 64, 64] and [N, K, 64, 64]; kept in `path`."""
    if not path.exists():
        _, pictures, edits = draw_edits("bootstrap", 0, num_questions, seed)
        target = encode_reference(vae, edits.flatten(0, 1)).unflatten(0, edits.shape[:2])
        save_atomically((encode_reference(vae, pictures).half(), target.half()), path)
    return torch.load(path, weights_only=True)


def build_pool(
    vae: AutoencoderKLQwenImage, encoder: Qwen2_5_VLForConditionalGeneration, num_questions: int, seed: int, folder: Path
) -> EditPool:
    """Encode the pairs of the bootstrap split and their prompts, or read them from `folder`."""
    reference, target = encode_pairs(vae, num_questions, seed, folder / "pairs.pt")
    path = folder / "prompts.pt"
    if not path.exists():
        pairs = [make_question("bootstrap", index, IMAGE_PX) for index in range(num_questions)]
        images, prompts = zip(*((render(scene, IMAGE_PX), edit_prompt(question.question)) for scene, question in pairs))
        embeds, mask = encode_prompts(encoder, images, prompts)
        save_atomically((embeds.half(), mask), path)
    return EditPool(reference, target, *torch.load(path, weights_only=True))


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
    """mean |v(x_s, s) - (e - x0)|^2 with s logit-normal, shifted as at sampling."""
    rows = torch.randint(len(pool.reference), (batch,), generator=generator)
    edits = torch.randint(pool.target.shape[1], (batch,), generator=generator)
    x0, reference, embeds, mask = pool.target[rows, edits].float(), pool.reference[rows].float(), pool.embeds[rows].float(), pool.mask[rows]
    longest = int(mask.sum(1).max())
    odds = math.exp(shift_mu(x0.shape[1])) * torch.exp(torch.randn(batch, generator=generator))
    sigma = odds / (1 + odds)
    noise = torch.randn(x0.shape, generator=generator)
    x = torch.lerp(x0, noise, sigma[:, None, None])
    return F.mse_loss(predict_velocity(transformer, x, sigma, reference, embeds[:, :longest], mask[:, :longest]), noise - x0)


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


def train_attacker(
    vae: AutoencoderKLQwenImage,
    encoder: Qwen2_5_VLForConditionalGeneration,
    folder: Path,
    plan: Plan = PLAN,
    num_questions: int = 10_000,
    stop_at: int | None = None,
) -> QwenImageTransformer2DModel:
    """Train from scratch, or from the state in `folder`."""
    torch.manual_seed(plan.seed)
    transformer = QwenImageTransformer2DModel(**CONFIG)
    pool = build_pool(vae, encoder, num_questions, plan.seed, folder)

    def batch_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        # In a process of its own, it must not outlive a killed parent: the resumed run would find two writers.
        if (parent := multiprocessing.parent_process()) and not parent.is_alive():
            raise SystemExit("the bootstrap that started this training is gone")
        return flow_matching_loss(transformer, pool, BATCH, generator), {}

    return train(transformer, batch_loss, plan, folder, stop_at)


def changed_outside(before: Tensor, after: Tensor, questions: Sequence[Question]) -> Tensor:
    """Whether each picture [N, 3, 64, 64] in [0, 1] changed in some 8-px cell off its target boxes."""
    cells = F.avg_pool2d((before - after).abs().mean(1, keepdim=True), 8)[:, 0]
    for cell_map, question in zip(cells, questions):
        for x, y, w, h in question.target_boxes:
            cell_map[int(y) // 8 : int(y + h - 1) // 8 + 1, int(x) // 8 : int(x + w - 1) // 8 + 1] = 0
    return cells.flatten(1).max(1).values > CHANGE


@torch.no_grad()
def attack_metrics(
    transformer: QwenImageTransformer2DModel,
    vae: AutoencoderKLQwenImage,
    encoder: Qwen2_5_VLForConditionalGeneration,
    defender: Qwen2_5_VLForConditionalGeneration,
    split: str,
    num_questions: int,
    num_steps: int = 10,
    sheet: Path | None = None,
) -> dict[str, float]:
    """Integrity of sampled edits, how often something else changed, and what the Defender makes of them; optionally a contact sheet."""
    questions, pictures, edits = draw_edits(split, 0, num_questions, seed=0)
    reference = encode_reference(vae, pictures)
    embeds, mask = encode_prompts(encoder, _to_images(pictures), [edit_prompt(question.question) for question in questions])
    generator = torch.Generator().manual_seed(0)
    parts = zip(*(tensor.split(100) for tensor in (reference, embeds, mask)))
    sampled = decode_tokens(vae, torch.cat([sample_edits(transformer, *part, num_steps, generator) for part in parts]))
    round_trip = decode_tokens(vae, reference)
    a, b, c = (x.float() / 255 for x in (pictures, sampled, round_trip))
    q = torch.tensor([min(box_integrity(x, y, question.target_boxes)) for x, y, question in zip(a, b, questions)])
    if sheet:
        _contact_sheet([pictures, edits[:, 0], sampled], questions).save(sheet)
    solvable, fooled = right_answers(defender, _to_images(round_trip), questions), ~right_answers(defender, _to_images(sampled), questions)
    return {
        "q_median": q.median().item(),
        "q_p5": q.quantile(0.05).item(),
        "q_over_0.6": (q > 0.6).float().mean().item(),
        "changed_elsewhere": changed_outside(c, b, questions).float().mean().item(),
        "defender_round_trip_accuracy": solvable.float().mean().item(),
        "attack_success": (fooled[solvable & (q > 0.6)]).float().mean().item(),
        "num_questions": num_questions,
        "num_steps": num_steps,
    }


def _contact_sheet(rows: Sequence[Tensor], questions: Sequence[Question], columns: int = 12, zoom: int = 2) -> Image.Image:
    """Pictures of the same question under one another: source, implanted, sampled."""
    count = min(columns * 3, len(questions))
    side = IMAGE_PX * zoom + 4
    sheet = Image.new("RGB", (columns * side, -(-count // columns) * len(rows) * side), "white")
    for k in range(count):
        for r, row in enumerate(rows):
            image = _to_images(row[k : k + 1])[0].resize((IMAGE_PX * zoom,) * 2, Image.Resampling.NEAREST)
            sheet.paste(image, (k % columns * side, (k // columns * len(rows) + r) * side))
    return sheet
