"""Micro-batches of (prompt, response) rows: prompts padded on the left, responses on the right.

The seam between prompt and response is then one column for the whole batch, and the head runs on the response rows only.
Shapes: B rows, P longest prompt, R longest response, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aot_fast.defender.prompt import Prompt


@dataclass(frozen=True)
class Row:
    """One response to train on."""

    prompt: Prompt
    ids: Tensor  # [R] int64
    logp: Tensor  # [R] float32, recorded at the rollout
    advantage: float
    sequence: int
    """Index of the response in the optimizer step."""
    weight: float = 1.0
    """0: takes part in forward and backward only so that every rank does the same number."""


@dataclass(frozen=True)
class Batch:
    """Rows as tensors on the device."""

    inputs: dict[str, Tensor]
    """Keyword arguments of the model."""
    targets: Tensor  # [B, R] int64
    mask: Tensor  # [B, R] bool
    logp: Tensor  # [B, R] float32
    advantages: Tensor  # [B, R] float32
    sequences: Tensor  # [B, R] int64


def left_pad(prompts: Sequence[Prompt], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [B, P], attention mask [B, P], positions [3, B, P] of prompts that end in the same column."""
    longest = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), longest), pad_id)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    positions = torch.zeros(3, len(prompts), longest, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        start = longest - len(prompt.ids)
        ids[i, start:], mask[i, start:], positions[:, i, start:] = prompt.ids, 1, prompt.positions
    return ids, mask, positions


def collate(rows: Sequence[Row], pad_id: int, image_token_id: int, device: torch.device) -> Batch:
    """One micro-batch. Rows of weight 0 have an all-False mask."""
    ids, mask, positions = left_pad([row.prompt for row in rows], pad_id)
    longest = max(len(row.ids) for row in rows)
    shape = (len(rows), longest)
    targets, logp, advantages = torch.full(shape, pad_id), torch.zeros(shape), torch.zeros(shape)
    response_mask = torch.zeros(shape, dtype=torch.bool)
    start = torch.tensor([row.prompt.next_position for row in rows])
    for i, row in enumerate(rows):
        n = len(row.ids)
        targets[i, :n], logp[i, :n], response_mask[i, :n] = row.ids, row.logp, True
        advantages[i] = row.advantage
    response_positions = (start[:, None] + torch.arange(longest)).expand(3, -1, -1)
    weights = torch.tensor([row.weight > 0 for row in rows])
    all_ids = torch.cat([ids, targets], 1)
    inputs = {
        "input_ids": all_ids,
        "attention_mask": torch.cat([mask, response_mask.long()], 1),
        "position_ids": torch.cat([positions, response_positions], 2),
        "mm_token_type_ids": (all_ids == image_token_id).int(),
        "pixel_values": torch.cat([row.prompt.pixels for row in rows]),
        "image_grid_thw": torch.cat([row.prompt.grid for row in rows]),
    }
    inputs = {name: x.to(device) for name, x in inputs.items()}
    sequences = torch.tensor([row.sequence for row in rows])[:, None].expand(shape)
    rest = (targets, response_mask & weights[:, None], logp, advantages, sequences)
    return Batch(inputs, *(x.to(device) for x in rest))


def response_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[B, R, V] logits that predict the response tokens."""
    longest = batch.targets.shape[1]
    return model(**batch.inputs, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1]
