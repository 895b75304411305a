"""Attention of the vision tower over all windows of all pictures in a few calls.

transformers calls scaled_dot_product_attention once a window: 334 times a block for a picture of 4 megapixels. Only to flash attention it
hands all windows at once, and by its name that is what this one is to transformers.
Shapes: T patches of all pictures, A heads, D values a head; windows follow each other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "aot_fast_flash_windows"


def install(model: nn.Module) -> None:
    """Let the vision tower of `model` attend by `windows`."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, windows)
    model.config.vision_config._attn_implementation = NAME


def windows(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: None, scaling: float, cu_seq_lens_q: Tensor, **rest: Any
) -> tuple[Tensor, None]:
    """[1, T, A, D] of q, k, v [1, A, T, D]; cu_seq_lens_q: [windows + 1], where each begins."""
    if q.is_cuda and q.dtype.itemsize == 2:
        longest, bounds = rest["max_length_q"], cu_seq_lens_q.to(torch.int32)
        flat = (x[0].transpose(0, 1) for x in (q, k, v))
        out = torch.ops.aten._flash_attention_forward(*flat, bounds, bounds, longest, longest, 0.0, False, False, scale=scaling)[0]
        return out[None], None
    starts, lengths = cu_seq_lens_q[:-1], cu_seq_lens_q.diff()
    parts, places = [], []
    for length in lengths.unique().tolist():  # those inside the picture, and a few kinds cut off by its edges
        index = starts[lengths == length][:, None] + torch.arange(length, device=q.device)
        out = F.scaled_dot_product_attention(*(x[0][:, index].transpose(0, 1) for x in (q, k, v)), scale=scaling)
        parts.append(out.transpose(1, 2).flatten(0, 1))  # [windows * length, A, D]
        places.append(index.flatten())
    return torch.cat(parts)[torch.cat(places).argsort()][None], None
