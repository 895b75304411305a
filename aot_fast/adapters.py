"""peft's LoRA layers with a forward that costs what the adapter's operations cost.

Over a bf16 layer peft casts the input to fp32 for its fp32 adapter, multiplies there, scales and adds in fp32 and casts back. Of a layer w
wide that moves 38 w bytes a token, which take as long as the layer's own 2 w^2 operations (w = 3,072, H100), and the fp32 input is kept for
the backward pass. Here h = x A^T and y + s h B^T are products in the layer's precision, the second one adding to y as it is written: 6 w
bytes, and kept are x, which its neighbours keep as well, and h. The Attacker's adapters stay fp32 (the Defender's are in its own precision
either way): what is rounded to bf16 are copies of A and B, and h, three times 2^-9 of what the adapter adds.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


def fuse_adapters(model: nn.Module) -> int:
    """Give every plain LoRA layer of `model` the forward above; returns how many. Modules, names and files stay peft's.

    For weights that are whole (Player.gathered): ZeRO-3's hooks do not expect a layer to read its adapter's. Layers with dropout, with
    biases of the adapter or of another kind of LoRA stay as they are.
    """
    plain = [m for m in model.modules() if type(m) is Linear and _is_plain(m)]
    for layer in plain:
        layer.__class__ = FusedLinear
    return len(plain)


def _is_plain(layer: Linear) -> bool:
    if layer.lora_variant or len(layer.active_adapters) != 1:
        return False
    [name] = layer.active_adapters
    no_bias = layer.lora_A[name].bias is None and layer.lora_B[name].bias is None
    return no_bias and isinstance(layer.lora_dropout[name], nn.Identity)


class FusedLinear(Linear):
    """A peft LoRA layer; x [..., I] -> [..., O]."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        [name] = self.active_adapters
        down, up, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        flat, rows = y.flatten(0, -2), x.flatten(0, -2)
        if torch.compiler.is_compiling():  # which fuses as well, and differentiates by itself
            return torch.addmm(flat, rows @ down.to(x.dtype).T, up.to(y.dtype).T, alpha=scale).view_as(y)
        return _Add.apply(flat, rows, down, up, scale).view_as(y)


class _Add(torch.autograd.Function):
    """y [N, O] + s (x A^T) B^T for x [N, I], A [r, I], B [O, r]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
        h = x @ down.to(x.dtype).T
        ctx.save_for_backward(x, h, down, up)
        ctx.scale = scale
        return torch.addmm(y, h, up.to(y.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, down, up = ctx.saved_tensors
        grad_h = (grad @ up.to(grad.dtype)).mul_(ctx.scale)  # [N, r]
        grad_x = grad_h @ down.to(grad.dtype) if ctx.needs_input_grad[1] else None
        return grad, grad_x, _product(grad_h.T, x).to(down.dtype), _product(grad.T, h).to(up.dtype).mul_(ctx.scale), None


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in fp32 where a GPU can write what it sums in."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda and a.dtype is not torch.float32 else a @ b
