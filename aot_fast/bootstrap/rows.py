"""Several exchanges about one picture in one row: [system, picture | question 1, answer 1 | question 2, answer 2 | ...].

An exchange sees the prefix and itself, and its positions restart after the prefix, so the loss is that of separate rows for half the work.
Shapes: B pictures, K exchanges, T tokens of a row, R response tokens, P image tokens (4 x 4 cells), H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from aot_fast.bootstrap.folders import IMAGE_PX, PATCH_PX, image_processor
from aot_fast.data.scenes import Scene, render

CELLS = IMAGE_PX // (2 * PATCH_PX)
"""Image tokens along a side."""
Exchange = tuple[str, str]
"""What follows the picture: the rest of the user's turn, and the response."""


def prefix_text(num_image_tokens: int = CELLS**2) -> str:
    """The chat template up to the question."""
    picture = "<|vision_start|>" + "<|image_pad|>" * num_image_tokens + "<|vision_end|>"
    return f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{picture}"


def turn_text(text: str) -> str:
    """The rest of the user's turn and the start of the response."""
    return f"{text}<|im_end|>\n<|im_start|>assistant\n"


def picture_of(scene: Scene) -> Tensor:
    """uint8 [3, 64, 64]."""
    return torch.from_numpy(np.array(render(scene, IMAGE_PX))).permute(2, 0, 1)


def pictures_of(scenes: Sequence[Scene]) -> Tensor:
    """uint8 [B, 3, 64, 64]."""
    return torch.stack([picture_of(scene) for scene in scenes])


def patchify(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [B, 3, 64, 64] -> pixel_values [B * 64, 3 * 2 * 8 * 8] and grids [B, 3], as the image processor makes them."""
    processor = image_processor()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    x = (pictures.float() / 255 - mean) / std
    batch, side = len(x), x.shape[-1] // PATCH_PX
    x = x.view(batch, 3, side // 2, 2, PATCH_PX, side // 2, 2, PATCH_PX).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(*x.shape[:6], 2, *x.shape[6:])
    return x.reshape(batch * side * side, -1), torch.tensor([[1, side, side]]).repeat(batch, 1)


@dataclass(frozen=True)
class Rows:
    """A batch of shared-prefix rows."""

    input_ids_BT: Tensor
    position_ids_3BT: Tensor
    mask_BTT: Tensor
    """True where a row (second axis) may attend (third axis)."""
    response_BT: Tensor
    """True at tokens that predict a token of an answer."""
    pixel_values: Tensor
    grids_B3: Tensor


def _prefix_positions(model: Qwen2_5_VLForConditionalGeneration, prefix: Tensor) -> Tensor:
    is_image = (prefix == model.config.image_token_id).long()[None]
    grid, mask = torch.tensor([[1, 2 * CELLS, 2 * CELLS]]), torch.ones_like(prefix)[None]
    return model.model.get_rope_index(prefix[None], image_grid_thw=grid, mm_token_type_ids=is_image, attention_mask=mask)[0][:, 0]


def pack_rows(model: nn.Module, tokenizer: Qwen2Tokenizer, pictures: Tensor, exchanges: Sequence[Sequence[Exchange]]) -> Rows:
    """K exchanges about each of B pictures as shared-prefix rows."""
    prefix = tokenizer(prefix_text(), return_tensors="pt").input_ids[0]
    prefix_positions = _prefix_positions(model, prefix)
    start = int(prefix_positions.max()) + 1
    rows = []
    for row in exchanges:
        ids, branch, offset, response = [], [], [], []
        for k, texts in enumerate(row):
            asked, answer = (tokenizer(text).input_ids for text in texts)
            ids += asked + answer
            branch += [k + 1] * (len(asked) + len(answer))
            offset += range(start, start + len(asked) + len(answer))
            # A token predicts the next one: the last of the question predicts the first of the answer.
            response += [False] * (len(asked) - 1) + [True] * len(answer) + [False]
        rows.append((ids, branch, offset, response))
    length = max(len(row[0]) for row in rows)

    def padded(column: int, fill: int) -> Tensor:
        return torch.tensor([list(row[column]) + [fill] * (length - len(row[column])) for row in rows])

    batch = len(rows)
    ids, branch = padded(0, tokenizer.pad_token_id), torch.cat([torch.zeros(batch, len(prefix), dtype=torch.long), padded(1, -1)], 1)
    total = branch.shape[1]
    visible = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    tail = padded(2, start).expand(3, -1, -1)
    pixel_values, grids = patchify(pictures)
    return Rows(
        input_ids_BT=torch.cat([prefix.expand(batch, -1), ids], 1),
        position_ids_3BT=torch.cat([prefix_positions[:, None].expand(-1, batch, -1), tail], 2),
        mask_BTT=visible & torch.ones(total, total, dtype=torch.bool).tril(),
        response_BT=torch.cat([torch.zeros(batch, len(prefix), dtype=torch.bool), padded(3, 0).bool()], 1),
        pixel_values=pixel_values,
        grids_B3=grids,
    )


def image_features(model: Qwen2_5_VLForConditionalGeneration, pixel_values: Tensor, grids_B3: Tensor) -> Tensor:
    """The merger's output, [B, P, H]."""
    features = model.model.get_image_features(pixel_values, grids_B3).pooler_output
    features = torch.cat(list(features)) if isinstance(features, (tuple, list)) else features
    return features.view(len(grids_B3), CELLS**2, -1)


def answer_logits(model: Qwen2_5_VLForConditionalGeneration, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [R, V] of the answers' tokens, these tokens [R], and the image features [B, P, H]."""
    core = model.model
    features = image_features(model, rows.pixel_values, rows.grids_B3)
    embeds = core.get_input_embeddings()(rows.input_ids_BT)
    is_image = (rows.input_ids_BT == model.config.image_token_id)[..., None].expand_as(embeds)
    hidden = core.language_model(
        inputs_embeds=embeds.masked_scatter(is_image, features.to(embeds.dtype)),
        position_ids=rows.position_ids_3BT,
        attention_mask={"full_attention": rows.mask_BTT[:, None]},
        use_cache=False,
    ).last_hidden_state
    targets = rows.input_ids_BT.roll(-1, 1)[rows.response_BT]
    return model.lm_head(hidden[rows.response_BT]), targets, features
