"""From pictures and prompts to what the transformer reads, and back: the numbers of the diffusers pipelines' own methods.

Legend: T prompt tokens, D text width, N target tokens, M reference tokens, c latent channels, h x w latent pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image as images
from PIL.Image import Image
from torch import Tensor

from aot_fast.attacker.batching import batches
from aot_fast.attacker.region import Window, cut, paste, place_window
from aot_fast.data.schema import Example
from aot_fast.engine import seed_of

if TYPE_CHECKING:
    from aot_fast.attacker.model import Attacker

SYSTEM = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then explain "
    "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's requirements while "
    "maintaining consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n"
)
IMAGE_PAD = "<|image_pad|>"
VISION = f"<|vision_start|>{IMAGE_PAD}<|vision_end|>"
NUMBERED = "Picture {}: " + VISION
"""How Edit-Plus shows each of its pictures; the plain pipeline has one, without a number."""
TEMPLATE = SYSTEM + "{}<|im_end|>\n<|im_start|>assistant\n"
"""Of the pictures and the prompt behind them."""
TEMPLATE_TOKENS = 64
"""prompt_template_encode_start_idx of both pipelines: the system turn, dropped from the prompt's embedding."""

Pictures = Image | Sequence[Image]
"""What one edit is made from: a picture, or several, of which the first is the one that is edited."""


@dataclass(frozen=True)
class Encoding:
    """Everything that conditions the edit of one picture by one prompt; shared by the samples of a group."""

    prompt: Tensor
    """[T, D] hidden states of the text encoder."""
    negative: Tensor | None
    """[T', D] of the negative prompt; None without guidance."""
    reference: Tensor
    """[M, 4c] packed, normalised latents of the pictures, one after the other."""
    reference_sizes: tuple[tuple[int, int], ...]
    """Height, width of each picture in tokens; M is the sum of their products."""
    height: int
    """Of the edit, in pixels."""
    width: int
    size: tuple[int, int]
    """Height, width of the edit in tokens; N is their product."""

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """`img_shapes` of one sample: frames, height, width of the target, then of each reference. Equal shapes can share a forward."""
        return [(1, *size) for size in (self.size, *self.reference_sizes)]

    @property
    def num_tokens(self) -> int:
        """Tokens of one sample in one forward, both prompts' where there is guidance."""
        image, passes = sum(height * width for _, height, width in self.shapes), 1 if self.negative is None else 2
        return passes * image + len(self.prompt) + (0 if self.negative is None else len(self.negative))


def blank_encoding(attacker: Attacker) -> Encoding:
    """The smallest there is: one target, one reference and one prompt token. For ranks that run along with nothing of their own."""
    like = {"device": attacker.runtime.device, "dtype": attacker.runtime.dtype}
    settings = attacker.player.module.config
    tokens, prompt = torch.zeros(1, settings.in_channels, **like), torch.ones(1, settings.joint_attention_dim, **like)
    negative = prompt if attacker.config.guidance > 1 else None
    return Encoding(prompt, negative, tokens, ((1, 1),), attacker.unit, attacker.unit, (1, 1))


def fit_size(width: int, height: int, pixels: int, unit: int) -> tuple[int, int]:
    """Height and width of about `pixels` area at the picture's aspect ratio, multiples of `unit` (at least one)."""
    wide = math.sqrt(pixels * width / height)
    tall = wide * height / width
    return max(1, round(tall / unit)) * unit, max(1, round(wide / unit)) * unit


@torch.no_grad()
def encode(attacker: Attacker, images: Sequence[Pictures], prompts: Sequence[str], windows: Sequence[bool] = ()) -> list[Encoding]:
    """One `Encoding` for each item of `images` and its prompt. windows: which are windows, edited at the size that they have (none are,
    by default).

    An item is a picture, or a sequence of pictures, of which the first is edited and decides the target's size (diffusers' Edit-Plus call
    takes the last one's, unless told). The text encoder sees each at `condition_pixels`, the VAE at `reference_pixels`, those behind the
    first at `context_pixels` where that is set. One item at a time, so that an encoding does not depend on what else is in the batch.
    Raises ValueError for several pictures where the pipeline is not an Edit-Plus one, and for a prompt that forges an image token.
    """
    flags = windows or [False] * len(images)
    return [_encode_one(attacker, rgb(pictures), *rest) for pictures, *rest in zip(images, prompts, flags, strict=True)]


def rgb(pictures: Pictures) -> tuple[Image, ...]:
    """All of them, in RGB; those that are so already are not copied."""
    several = [pictures] if isinstance(pictures, Image) else pictures
    return tuple(picture if picture.mode == "RGB" else picture.convert("RGB") for picture in several)


def _encode_one(attacker: Attacker, images: Sequence[Image], prompt: str, window: bool) -> Encoding:
    config, unit = attacker.config, attacker.unit
    if len(images) > 1 and not attacker.plus:
        raise ValueError(
            f"attacker.model = {config.model!r}: QwenImageEditPipeline edits one picture and sees no other, {len(images)} were given; "
            "use an Edit-Plus pipeline (Qwen-Image-Edit-2509 or -2511), or give one"
        )
    edited = images[0].size
    height, width = edited[::-1] if window else fit_size(*edited, config.target_pixels, unit)
    areas = [config.reference_pixels] + [config.context_pixels or config.reference_pixels] * (len(images) - 1)
    references, sizes = zip(*(_encode_reference(attacker, image, area) for image, area in zip(images, areas)))
    conditions = [resize(image, *fit_size(*image.size, config.condition_pixels, unit)) for image in images]
    return Encoding(
        prompt=_encode_prompt(attacker, conditions, prompt),
        negative=_encode_prompt(attacker, conditions, config.negative_prompt) if config.guidance > 1 else None,
        reference=torch.cat(references),
        reference_sizes=sizes,
        height=height,
        width=width,
        size=(height // unit, width // unit),
    )


def resize(image: Image, height: int, width: int) -> Image:
    """As the pipelines resize (Lanczos)."""
    return VaeImageProcessor().resize(image, height, width)


def _encode_reference(attacker: Attacker, image: Image, pixels: int) -> tuple[Tensor, tuple[int, int]]:
    height, width = fit_size(*image.size, pixels, attacker.unit)
    latents = image_to_latents(attacker, image, height, width)
    return pack(latents)[0], (height // attacker.unit, width // attacker.unit)


def expand_image_pad(text: str, grid_thw: Tensor, merge_size: int) -> str:
    """Repeat each `<|image_pad|>` once for every token of its picture, as Qwen2VLProcessor does (it needs torchvision to load)."""
    first, *rest = text.split(IMAGE_PAD)
    counts = (grid_thw.prod(-1) // merge_size**2).tolist()
    return first + "".join(IMAGE_PAD * count + part for count, part in zip(counts, rest, strict=True))


def _encode_prompt(attacker: Attacker, images: Sequence[Image], prompt: str) -> Tensor:
    """[T, D]: last hidden states behind the template's system turn. Raises ValueError when the prompt forges an image token."""
    if IMAGE_PAD in prompt:
        raise ValueError(f"the prompt {prompt!r} holds {IMAGE_PAD}, which stands for a picture")
    pixels = attacker.image_processor(images=list(images), return_tensors="pt").to(attacker.runtime.device)
    shown = "".join(NUMBERED.format(i + 1) for i in range(len(images))) if attacker.plus else VISION
    text = expand_image_pad(TEMPLATE.replace("{}", shown + prompt), pixels["image_grid_thw"], attacker.image_processor.merge_size)
    tokens = attacker.tokenizer([text], return_tensors="pt").to(attacker.runtime.device)
    hidden = attacker.text_encoder.model(  # without the head: its logits over the vocabulary are not wanted
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
        pixel_values=pixels["pixel_values"].to(attacker.runtime.dtype),
        image_grid_thw=pixels["image_grid_thw"],
    ).last_hidden_state
    return hidden[0, TEMPLATE_TOKENS:]


def image_to_latents(attacker: Attacker, image: Image, height: int, width: int) -> Tensor:
    """[1, c, h, w] normalised latents (mode of the posterior) of the picture resized to height x width pixels."""
    pixels = VaeImageProcessor(vae_scale_factor=attacker.unit).preprocess(image, height, width).unsqueeze(2)
    moments = attacker.vae.encode(pixels.to(attacker.runtime.device, attacker.runtime.dtype))
    mean, std = _statistics(attacker)
    return ((moments.latent_dist.mode() - mean) / std)[:, :, 0]


def _statistics(attacker: Attacker) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, [1, c, 1, 1, 1]."""
    config = attacker.vae.config
    made = [torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)]
    mean, std = (values.to(attacker.runtime.device, attacker.runtime.dtype) for values in made)
    return mean, std


def pack(latents: Tensor) -> Tensor:
    """[B, c, h, w] -> [B, h/2 * w/2, 4c]: a token is 2 x 2 latent pixels."""
    batch, channels, height, width = latents.shape
    blocks = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, N, 4c] -> [B, c, h, w] with `size` = (h / 2, w / 2)."""
    batch, _, channels = tokens.shape
    blocks = tokens.view(batch, *size, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(batch, channels // 4, 2 * size[0], 2 * size[1])


@torch.no_grad()
def decode(attacker: Attacker, latents: Sequence[Tensor], encodings: Sequence[Encoding]) -> list[Image]:
    """The pictures of final latents ([N, 4c] each) at their encodings' target size, `config.decode_batch` of a size at a time."""
    decoded: list[tuple[list[int], Callable[[], Tensor]]] = []
    for indices in batches(range(len(latents)), attacker.config.decode_batch, lambda i: encodings[i].size):
        together = torch.cat([unpack(latents[i][None], encodings[i].size) for i in indices])
        decoded.append((indices, _on_host(_decode(attacker, together))))  # the host makes pictures of a batch while a GPU decodes the next
    made = {i: picture for indices, pixels in decoded for i, picture in zip(indices, _pictures(pixels()))}
    return [made[i] for i in range(len(latents))]


def _decode(attacker: Attacker, latents: Tensor) -> Tensor:
    """`latents`: [B, c, h, w], normalised. uint8 [B, height, width, 3], rounded as the pipelines round."""
    mean, std = _statistics(attacker)
    pixels = attacker.vae.decode(latents.to(attacker.runtime.dtype)[:, :, None] * std + mean, return_dict=False)[0][:, :, 0]
    return ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _on_host(x: Tensor) -> Callable[[], Tensor]:
    """A function that waits for `x` to be computed and copied, and for nothing queued behind it."""
    if not x.is_cuda:
        return lambda: x
    host, done = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(x.contiguous(), non_blocking=True)
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait


def _pictures(pixels: Tensor) -> list[Image]:
    """Of [B, H, W, 3] on the host."""
    return [images.fromarray(array) for array in pixels.numpy()]


@torch.no_grad()
def roundtrip(attacker: Attacker, examples: Sequence[Example]) -> list[Image]:
    """Each picture, or a window of it as the Attacker edits them, once through the VAE at the target resolution: what the codec alone does
    must not count as an attack."""
    return [_roundtrip(attacker, example) for example in examples]


def _roundtrip(attacker: Attacker, example: Example) -> Image:
    image = example.image.convert("RGB")
    window = window_of(attacker, example, seed_of("roundtrip", example.key))
    part = image if window is None else cut(image, window)
    size = fit_size(*part.size, attacker.config.target_pixels, attacker.unit) if window is None else part.size[::-1]
    [made] = _pictures(_decode(attacker, image_to_latents(attacker, part, *size)).cpu())
    return made if window is None else paste(image, window, made, attacker.config.feather)


def window_of(attacker: Attacker, example: Example, seed: int) -> Window | None:
    """Where the picture is edited; None: everywhere (`config.region`)."""
    config = attacker.config
    if config.region == "whole":
        return None
    return place_window(example.image.size, example.question.target_boxes, config.target_pixels, attacker.unit, seed)
