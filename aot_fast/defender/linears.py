"""Linear layers that a GPU runs faster in another shape: a width that tensor cores can read, three small products as one.

Both give the layers another forward and leave modules, weights and files as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALIGNMENT = 8
"""Elements of a half type that tensor cores read at once. Qwen2.5-VL's vision tower is 3,420 wide inside: without padding its products run
in a kernel for misaligned rows, at a third of the speed."""


def pad_vision_mlps(visual: nn.Module) -> None:
    """Let gate, up and down projections of the vision blocks multiply padded weights: exact, for what is added is zero.

    Layers with a LoRA adapter keep their own forward, as do aligned ones.
    """
    for block in visual.blocks:
        layers = [getattr(block.mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if all(type(layer) is nn.Linear for layer in layers) and layers[2].in_features % ALIGNMENT:
            more = -layers[2].in_features % ALIGNMENT
            for layer in layers[:2]:
                layer.forward = partial(_wider, layer, more)
            layers[2].forward = partial(_deeper, layers[2], more)


def _wider(layer: nn.Linear, more: int, x: Tensor) -> Tensor:
    return F.linear(x, F.pad(layer.weight, (0, 0, 0, more)), None if layer.bias is None else F.pad(layer.bias, (0, more)))


def _deeper(layer: nn.Linear, more: int, x: Tensor) -> Tensor:
    return F.linear(x, F.pad(layer.weight, (0, more)), layer.bias)


@contextmanager
def joined_projections(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, queries, keys and values of the text layers come from one product: of 64 rows, three take two thirds longer.

    For whole weights that do not change. Layers with a LoRA adapter stay as they are.
    """
    changed: list[nn.Linear] = []
    try:
        for layer in layers:
            parts = [getattr(layer.self_attn, name, None) for name in ("q_proj", "k_proj", "v_proj")]
            if all(type(part) is nn.Linear for part in parts):
                for part, forward in zip(parts, _joined(parts)):
                    part.forward = forward
                    changed.append(part)
        yield
    finally:
        for part in changed:
            del part.forward


def _joined(parts: Sequence[nn.Linear]) -> tuple[Callable[[Tensor], Tensor], ...]:
    weight = torch.cat([part.weight for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    sizes = [part.out_features for part in parts]
    made: list[Tensor] = []

    def first(x: Tensor) -> Tensor:
        made[:] = F.linear(x, weight, bias).split(sizes, -1)
        return made[0]

    return first, lambda x: made[1], lambda x: made[2]
