"""Micro-batches of responses with their prompts.

`pack` (the fast path): all in one row without padding, a prompt once for its responses (attention.py). `collate` (the plain path): a row a
response, prompts padded on the left, responses on the right. In both the head runs on the tokens that predict a response's token, and on
nothing else, response after response.
Shapes: N tokens of responses, with padding where there is some; V vocabulary. `collate`: B rows, P longest prompt, R longest response,
N = B * R.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from aot_fast.defender.attention import PackedRow
from aot_fast.defender.model import Defender
from aot_fast.defender.prompt import Prompt, blank_prompt
from aot_fast.defender.vision_attention import takes_host_grids


@dataclass(frozen=True)
class Row:
    """One response to train on."""

    prompt: Prompt
    ids: Tensor  # [R] int64
    logp: Tensor  # [R] float32, of the policy that sampled it
    advantage: Tensor  # [R] float32
    sequence: int
    """Index of the response in the optimizer step."""
    weight: float = 1.0
    """0: takes part in forward and backward only so that every rank does the same number."""


@dataclass(frozen=True)
class Batch:
    """Rows as tensors on the device."""

    inputs: dict[str, Any]
    """Keyword arguments of the model, whose logits are then those of the predicting tokens."""
    targets: Tensor  # [N] int64
    mask: Tensor  # [N] bool
    logp: Tensor  # [N] float32
    advantages: Tensor  # [N] float32
    rows: Tensor  # [N] int64, the number of the row: sorted, as the operators want `seq_ids`
    sequences: Tensor  # [N] int64


def batch_of(defender: Defender, rows: Sequence[Row]) -> Batch:
    """One micro-batch, as defender.shared_prefix says. Rows that follow each other with the same Prompt object share it."""
    return (pack if defender.config.shared_prefix else collate)(defender, rows)


def shared_prompts(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs of rows with the same Prompt object."""
    return [list(run) for _, run in groupby(rows, key=lambda row: id(row.prompt))]


def pack(defender: Defender, rows: Sequence[Row]) -> Batch:
    """[prompt | r1 | ... | rG | next prompt | ...]."""
    groups = shared_prompts(rows)
    segments = [(len(group[0].prompt.ids), tuple(len(row.ids) for row in group)) for group in groups]
    prompts = [group[0].prompt for group in groups]
    if not any(len(p.grid) for p in prompts):
        prompts.append(blank_prompt(defender))
        segments.append((len(prompts[-1].ids), ()))
    ids, positions = [], []
    for prompt, group in zip(prompts, [*groups, []]):
        ids += [prompt.ids, *(row.ids for row in group)]
        positions += [prompt.positions, *(_response_positions(prompt, len(row.ids)) for row in group)]
    layout = PackedRow(tuple(segments), defender.runtime.device, defender.config.attention)
    inputs = _inputs(defender, torch.cat(ids)[None], torch.cat(positions, 1)[:, None], prompts)
    inputs |= {"attention_mask": None, "logits_to_keep": layout.predicting, "layout": layout}
    return _batch(defender, inputs, rows, None)


def collate(defender: Defender, rows: Sequence[Row]) -> Batch:
    """Rows of weight 0 have an all-False mask."""
    rows = list(rows)
    if not any(len(row.prompt.grid) for row in rows):
        rows.append(Row(blank_prompt(defender), rows[0].ids[:1], rows[0].logp[:1], torch.zeros(1), rows[0].sequence, weight=0.0))
    pad_id = defender.tokenizer.pad_token_id
    ids, mask, positions = left_pad([row.prompt for row in rows], pad_id)
    num_prompt, longest = ids.shape[1], max(len(row.ids) for row in rows)
    responses = torch.stack([_padded(row.ids, longest, pad_id) for row in rows])
    response_mask = torch.arange(longest) < torch.tensor([len(row.ids) for row in rows])[:, None]
    response_positions = torch.stack([_response_positions(row.prompt, longest) for row in rows], 1)
    inputs = _inputs(defender, torch.cat([ids, responses], 1), torch.cat([positions, response_positions], 2), [row.prompt for row in rows])
    inputs["attention_mask"] = torch.cat([mask, response_mask.long()], 1).to(defender.runtime.device)
    inputs["logits_to_keep"] = torch.arange(num_prompt - 1, num_prompt + longest - 1, device=defender.runtime.device)
    return _batch(defender, inputs, rows, longest)


def prompt_inputs(defender: Defender, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Keyword arguments of the model for prompts that follow each other in one row."""
    return _inputs(defender, torch.cat([p.ids for p in prompts])[None], torch.cat([p.positions for p in prompts], 1)[:, None], prompts)


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


def response_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[N, V] logits that predict the responses' tokens."""
    return model(**batch.inputs, use_cache=False).logits.flatten(0, 1)


def pictures_of(defender: Defender, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The keyword arguments of the vision tower, empty where there is no picture."""
    device = defender.runtime.device
    if not any(len(p.grid) for p in prompts):
        return {}
    # Copied one by one: put together on the host, they would no longer lie in page-locked memory.
    pixels = [p.pixels.to(device, non_blocking=True) for p in prompts]
    grids = torch.cat([p.grid for p in prompts])
    host = takes_host_grids(defender.core.model.visual)
    return {"pixel_values": torch.cat(pixels), "image_grid_thw": grids if host else grids.to(device)}


def _inputs(defender: Defender, ids: Tensor, positions: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    device = defender.runtime.device
    inputs = {"input_ids": ids, "position_ids": positions, "mm_token_type_ids": (ids == defender.core.config.image_token_id).int()}
    return {name: x.to(device, non_blocking=True) for name, x in inputs.items()} | pictures_of(defender, prompts)


def _response_positions(prompt: Prompt, length: int) -> Tensor:
    """[3, length]: every response goes on after its prompt."""
    return (prompt.next_position + torch.arange(length)).expand(3, -1)


def _padded(x: Tensor, length: int | None, value: float) -> Tensor:
    return x if length is None else torch.nn.functional.pad(x, (0, length - len(x)), value=value)


def _batch(defender: Defender, inputs: dict[str, Any], rows: Sequence[Row], length: int | None) -> Batch:
    """length: what responses are padded to."""
    lengths = torch.tensor([len(row.ids) for row in rows])
    places = lengths if length is None else torch.full_like(lengths, length)  # of each row among the N
    live = torch.cat([torch.arange(n) < (m if row.weight else 0) for row, n, m in zip(rows, places.tolist(), lengths.tolist())])
    fields = {
        "targets": torch.cat([_padded(row.ids, length, defender.tokenizer.pad_token_id) for row in rows]),
        "mask": live,
        "logp": torch.cat([_padded(row.logp, length, 0.0) for row in rows]),
        "advantages": torch.cat([_padded(row.advantage, length, 0.0) for row in rows]),
        "rows": torch.arange(len(rows)).repeat_interleave(places),
        "sequences": torch.tensor([row.sequence for row in rows]).repeat_interleave(places),
    }
    return Batch(inputs, **{name: x.to(defender.runtime.device, non_blocking=True) for name, x in fields.items()})
