"""Attention of the vision tower over all windows of all pictures in a few calls, and where the windows are, found out on the host.

transformers calls scaled_dot_product_attention once a window: 334 times a block for a picture of 4 megapixels. Only to flash attention it
hands all windows at once, and by its name that is what this one is to transformers.
Shapes: T patches of all pictures, A heads, D values a head; windows follow each other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

NAME = "aot_fast_flash_windows"


def install(model: nn.Module) -> None:
    """Let the vision tower of `model` attend by `windows`, and Qwen2.5-VL's take its `grid_thw` on the host."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, windows)
    model.config.vision_config._attn_implementation = NAME
    if model.config.model_type == "qwen2_5_vl":
        visual = model.model.visual
        visual.forward = partial(_with_places, visual, visual.forward)


def takes_host_grids(visual: nn.Module) -> bool:
    """Whether `grid_thw` may stay on the host; read on a GPU, it would have the host wait for all that is under way there."""
    return isinstance(visual.forward, partial)


def _with_places(visual: nn.Module, forward: Callable, hidden_states: Tensor, grid_thw: Tensor, **rest: Any) -> Any:
    settings = visual.spatial_merge_size, visual.window_size, visual.patch_size
    tensors, longest = _places(tuple(map(tuple, grid_thw.tolist())), *settings, hidden_states.is_cuda)
    moved = {name: x.to(hidden_states.device, non_blocking=True) for name, x in tensors.items()}
    return forward(hidden_states, grid_thw=grid_thw, **moved, **longest, **rest)


@lru_cache(64)
def _places(
    grid: tuple[tuple[int, int, int], ...], merge: int, window: int, patch: int, pinned: bool
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What the tower's forward would find out from the grid, under the names that it takes it by."""
    grid_thw = torch.tensor(grid)
    window_index, in_windows = get_vision_window_index(grid_thw, merge, window, patch)
    bounds = {"cu_seqlens": get_vision_cu_seqlens(grid_thw), "cu_window_seqlens": in_windows}
    tensors = {"position_ids": get_vision_position_ids(grid_thw, merge), "window_index": window_index, **bounds}
    longest = {name: int(x.diff().max()) for name, x in zip(("max_seqlen", "max_window_seqlen"), bounds.values())}
    return {name: x.pin_memory() if pinned else x for name, x in tensors.items()}, longest


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
