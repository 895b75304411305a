"""Floating-point operations of the Attacker, counted from what it does: a multiplication and an addition are two.

Each needed operation once: recomputation under gradient checkpointing is stated apart and is no part of an MFU. Of the frozen matrices of a
LoRA run the backward pass costs one forward (the input's gradient), of trained ones two; attention costs two in either case. Neglected: the
adapters' own products, norms, modulation, anything elementwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from aot_fast.attacker.still_vae import use_image_convolutions
from aot_fast.defender import flops as text_flops


class Tokens(NamedTuple):
    """Of one sample in the transformer."""

    target: int
    reference: int
    """Of all reference pictures."""
    text: int
    negative: int = 0
    """Of the negative prompt; 0: no guidance."""


class Forward(NamedTuple):
    """FLOPs of one forward pass of the transformer for one sample."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def forward_flops(settings: Mapping[str, Any], tokens: Tokens) -> Forward:
    """settings: the transformer's configuration, as QwenImageTransformer2DModel has it. With guidance both prompts' passes."""
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    image = tokens.target + tokens.reference
    linear = attention = 0
    for text in (tokens.text, *([tokens.negative] if tokens.negative else [])):
        # q, k, v, out: 4 squares; the feed-forward's two matrices: 8 more. The two streams have their own.
        block = 12 * width**2 * (image + text)
        ends = width * (settings["in_channels"] * image + settings["joint_attention_dim"] * text)
        out = width * settings["patch_size"] ** 2 * settings["out_channels"] * image
        linear += 2 * (settings["num_layers"] * block + ends + out)
        attention += 4 * settings["num_layers"] * width * (image + text) ** 2
    return Forward(linear, attention)


def training_flops(forward: Forward, lora: bool) -> int:
    """Of forward and backward on one recorded step."""
    return forward.linear * (2 if lora else 3) + 3 * forward.attention


@dataclass(frozen=True)
class Work:
    """One optimizer step's edits, of equal sizes."""

    prompts: int
    group: int
    """Samples a prompt."""
    tokens: Tokens
    steps: float
    """Denoising steps of a sample, without those that its group shares."""
    shared_steps: float
    """Denoising steps before the window that one pass does for the group."""
    trained_steps: int
    lora: bool
    checkpointing: bool
    reference_pass: bool = False
    """A KL to the base: one more forward a trained step."""
    encodings: int = 0
    """How often a picture and its prompt are encoded; 0: once a group."""


@dataclass(frozen=True)
class StepFlops:
    """By stage; recomputed is no part of `total`."""

    encode: int
    denoise: int
    decode: int
    update: int
    recomputed: int

    @property
    def total(self) -> int:
        return self.encode + self.denoise + self.decode + self.update


def step_flops(settings: Mapping[str, Any], work: Work, encoding: int = 0, decoding: int = 0) -> StepFlops:
    """FLOPs of sampling and training `work`. encoding, decoding: of one picture (encoding_flops, vae_flops)."""
    one = forward_flops(settings, work.tokens)
    samples = work.prompts * work.group
    passes = samples * work.steps + work.prompts * work.shared_steps
    trained = samples * work.trained_steps
    return StepFlops(
        encode=(work.encodings or work.prompts) * encoding,
        denoise=round(passes * one.total),
        decode=samples * decoding,
        update=trained * (training_flops(one, work.lora) + (one.total if work.reference_pass else 0)),
        recomputed=trained * one.total if work.checkpointing else 0,
    )


def text_encoder_flops(config: Any, pixels: tuple[int, int], tokens: int) -> int:
    """Of one picture of height, width `pixels` and a prompt of `tokens` in all through the text encoder, without its head."""
    patch = config.vision_config.patch_size
    shape = text_flops.GroupShape(((1, pixels[0] // patch, pixels[1] // patch),), tokens, (1,))
    counted = text_flops.forward_flops(config, [shape])
    return counted.vision + counted.linear + counted.attention


@lru_cache(64)
def vae_flops(settings: str, height: int, width: int, encode: bool, still: bool) -> int:
    """Of the VAE on one picture, counted by torch as it runs without data. settings: the VAE's configuration as JSON."""
    from diffusers import AutoencoderKLQwenImage
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = AutoencoderKLQwenImage.from_config(json.loads(settings))
        if still:
            use_image_convolutions(vae)
        scale = 2 ** len(vae.temperal_downsample)
        picture = torch.zeros(1, 3, 1, height, width)
        latents = torch.zeros(1, vae.config.z_dim, 1, height // scale, width // scale)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            vae.encode(picture) if encode else vae.decode(latents)
    return counter.get_total_flops()
