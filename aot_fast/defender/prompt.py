"""From a question with its picture to the Defender's inputs.

Shapes: P prompt tokens, D = channels * temporal patch * patch^2 values of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aot_fast.data.schema import Example, question_text
from aot_fast.defender.model import Defender

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_PAD = "<|image_pad|>"
_TOKENIZER = Lock()
"""A fast tokenizer refuses ("Already borrowed") to work for two threads at once."""


@dataclass(frozen=True)
class Prompt:
    """The inputs of one prompt, on the host."""

    key: str
    """Hash of prompt and image bytes."""
    ids: Tensor  # [P] int64
    positions: Tensor  # [3, P] int64, M-RoPE
    pixels: Tensor  # [patches of all images, D] float32
    grid: Tensor  # [images, 3] int64: frames, rows, columns of patches

    @cached_property
    def next_position(self) -> int:
        """M-RoPE position of a response's first token."""
        return int(self.positions.max()) + 1

    @property
    def num_bytes(self) -> int:
        return sum(x.nbytes for x in (self.ids, self.positions, self.pixels, self.grid))

    def pinned(self) -> Prompt:
        """The same in page-locked memory, from which copies to a GPU need not be waited for."""
        return Prompt(self.key, *(x.pin_memory() for x in (self.ids, self.positions, self.pixels, self.grid)))


def chat_text(defender: Defender, text: str, num_images: int = 1) -> str:
    """The chat template around images and text, ready for the answer."""
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    return defender.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)


def encode(defender: Defender, example: Example) -> Prompt:
    """Tokens, positions and pixels of `example`.

    Raises ValueError when the prompt is longer than `defender.max_prompt_tokens`: it is refused, never truncated.
    """
    question = example.question
    chat = chat_text(defender, question_text(question.question, question.options))
    return encode_chat(defender, chat, [example.image], example.key, f"question {question.id!r}")


def encode_chat(defender: Defender, chat: str, images: Sequence[Image], key: str, name: str) -> Prompt:
    """Any number of images, even none: `chat` is the templated text, with one IMAGE_PAD for each. `name` stands in errors.

    Raises ValueError when the prompt is longer than `defender.max_prompt_tokens`, or has not as many places for images as there are images.
    """
    pixels, grid = _patches(defender, images)
    num_tokens = (grid.prod(1) // defender.image_processor.merge_size**2).tolist()
    pieces = chat.split(IMAGE_PAD)
    if len(pieces) != len(images) + 1:
        raise ValueError(f"{name}: its prompt has {len(pieces) - 1} places for images, but {len(images)} images")
    text = pieces[0] + "".join(IMAGE_PAD * n + piece for n, piece in zip(num_tokens, pieces[1:]))
    with _TOKENIZER:
        ids = torch.tensor(defender.tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) > defender.config.max_prompt_tokens:
        raise ValueError(
            f"{name}: its prompt has {len(ids)} tokens ({sum(num_tokens)} of images), more than "
            f"defender.max_prompt_tokens = {defender.config.max_prompt_tokens}; raise it or lower defender.max_pixels"
        )
    types = (ids == defender.core.config.image_token_id).int()[None]
    positions, _ = defender.core.model.get_rope_index(ids[None], types, image_grid_thw=grid)
    return Prompt(key, ids, positions[:, 0], pixels, grid)


def blank_prompt(defender: Defender) -> Prompt:
    """The smallest picture alone: in a micro-batch of text it lets the vision tower run, as it does on other ranks (ZeRO-3 waits)."""
    side = defender.image_processor.merge_size
    empty, _ = _patches(defender, [])
    ids, positions = torch.tensor([defender.core.config.image_token_id]), torch.zeros(3, 1, dtype=torch.long)
    return Prompt("", ids, positions, empty.new_zeros(side * side, empty.shape[1]), torch.tensor([[1, side, side]]))


def _patches(defender: Defender, images: Sequence[Image]) -> tuple[Tensor, Tensor]:
    """Pixels [patches, D] and grid [images, 3]."""
    if not images:
        vision = defender.core.config.vision_config
        channels = getattr(vision, "in_channels", 3)
        return torch.zeros(0, channels * vision.temporal_patch_size * vision.patch_size**2), torch.zeros(0, 3, dtype=torch.long)
    made = defender.image_processor(images=list(images), return_tensors="pt")
    return made["pixel_values"].float(), made["image_grid_thw"]
