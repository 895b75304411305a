"""The pairs that the small Attacker is trained on, encoded once: instructed edits first, then implanted distractors.

Shapes: N pairs, L prompt tokens, H width of the text encoder, 64 packed tokens of 64 channels per picture.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from aot_fast.bootstrap.answers import chat_inputs
from aot_fast.bootstrap.folders import EDIT_PREFIX_TOKENS, EDIT_TEMPLATE, IMAGE_PX, build_tokenizer
from aot_fast.bootstrap.instructions import instruct
from aot_fast.bootstrap.rows import pictures_of
from aot_fast.bootstrap.training import save_atomically
from aot_fast.bootstrap.vae import decode_latents, encode_pictures
from aot_fast.data.implant import implant
from aot_fast.data.scenes import Scene, make_question
from aot_fast.data.schema import edit_prompt

LATENT_SIDE = IMAGE_PX // 4


@dataclass(frozen=True)
class Pair:
    """A scene, what the editor is told, and the scene that it should make of it."""

    before: Scene
    prompt: str
    after: Scene


def instructed_pairs(split: str, count: int, seed: int) -> Iterator[Pair]:
    """Plain instructions on the scenes of a split."""
    for index in range(count):
        scene, _ = make_question(split, index, IMAGE_PX)
        made = instruct(scene, random.Random(f"instruct {seed} {index}"))
        yield Pair(scene, made.prompt, made.scene)


def implanted_pairs(split: str, count: int, seed: int) -> Iterator[Pair]:
    """Distractors implanted by rule, asked for as the game asks."""
    for index in range(count):
        scene, question = make_question(split, index, IMAGE_PX)
        made = implant(scene, question, random.Random(f"implant {seed} {index}"), IMAGE_PX)
        yield Pair(scene, edit_prompt(question.question), made.scene)


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


def to_images(pictures: Tensor) -> list[Image.Image]:
    """uint8 [N, 3, H, W] -> pictures."""
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pictures]


@dataclass(frozen=True)
class EditPool:
    """Encoded pairs, in half precision: encoding them again at every step would double the time."""

    reference: Tensor
    """[N, 64, 64]"""
    target: Tensor
    """[N, 64, 64]"""
    embeds: Tensor
    """[N, L, H]"""
    mask: Tensor
    """[N, L]"""


def encode_pool(vae: AutoencoderKLQwenImage, encoder: Qwen2_5_VLForConditionalGeneration, pairs: Sequence[Pair]) -> EditPool:
    """Latents of both pictures of each pair, and its prompt's embedding."""
    before, after = (pictures_of(scenes) for scenes in zip(*((p.before, p.after) for p in pairs)))
    embeds, mask = encode_prompts(encoder, to_images(before), [pair.prompt for pair in pairs])
    return EditPool(encode_reference(vae, before).half(), encode_reference(vae, after).half(), embeds.half(), mask)


def load_pool(vae: AutoencoderKLQwenImage, encoder: Qwen2_5_VLForConditionalGeneration, pairs: Iterator[Pair], path: Path) -> EditPool:
    """The pool kept in `path`, encoded if it is not there."""
    if not path.exists():
        save_atomically(vars(encode_pool(vae, encoder, list(pairs))), path)
    return EditPool(**torch.load(path, weights_only=True))
