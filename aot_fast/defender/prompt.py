"""From a question with its picture to the Defender's inputs.

Shapes: P prompt tokens, D = channels * temporal patch * patch^2 values of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aot_fast.data.schema import Example, question_text
from aot_fast.defender.model import Defender

IMAGE_PAD = "<|image_pad|>"


@dataclass(frozen=True)
class Prompt:
    """The inputs of one prompt, on the host."""

    key: str
    """Hash of prompt and image bytes."""
    ids: Tensor  # [P] int64
    positions: Tensor  # [3, P] int64, M-RoPE
    pixels: Tensor  # [patches, D] float32
    grid: Tensor  # [1, 3] int64: frames, rows, columns of patches

    @property
    def next_position(self) -> int:
        """M-RoPE position of a response's first token."""
        return int(self.positions.max()) + 1


def chat_text(defender: Defender, example: Example) -> str:
    """The chat template around image and question, ready for the answer."""
    question = example.question
    content = [{"type": "image"}, {"type": "text", "text": question_text(question.question, question.options)}]
    return defender.tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)


def encode(defender: Defender, example: Example) -> Prompt:
    """Tokens, positions and pixels of `example`.

    Raises ValueError when the prompt is longer than `defender.max_prompt_tokens`: it is refused, never truncated.
    """
    vision = defender.image_processor(images=[example.image], return_tensors="pt")
    grid = vision["image_grid_thw"]
    num_image_tokens = int(grid[0].prod()) // defender.image_processor.merge_size**2
    text = chat_text(defender, example).replace(IMAGE_PAD, IMAGE_PAD * num_image_tokens, 1)
    ids = torch.tensor(defender.tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) > defender.config.max_prompt_tokens:
        raise ValueError(
            f"question {example.question.id!r}: its prompt has {len(ids)} tokens ({num_image_tokens} of the image), more than "
            f"defender.max_prompt_tokens = {defender.config.max_prompt_tokens}; raise it or lower defender.max_pixels"
        )
    types = (ids == defender.core.config.image_token_id).int()[None]
    positions, _ = defender.core.model.get_rope_index(ids[None], types, image_grid_thw=grid)
    return Prompt(example.key, ids, positions[:, 0], vision["pixel_values"].float(), grid)
