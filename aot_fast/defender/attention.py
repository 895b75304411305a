"""Attention over a packed row in which the responses of a group share their prompt (DESIGN.md section 5).

    row   [prompt 1 | r11 | ... | r1G | prompt 2 | r21 | ...], one segment a prompt or response
    own   every token attends causally inside its segment
    past  a response's token attends to its whole prompt too; the two parts are joined by their log-sum-exps

With O the merged output and lse the merged log-sum-exp, exp(q k - lse) is the weight of a key among *both* parts' keys: the backward pass
of either part alone is an ordinary flash-attention backward pass that is handed the merged O and lse. Exact, and the gradient of a prompt's
keys and values is one sum in a fixed order, whatever the number of responses.
Shapes: T tokens of the row, A query heads, K key-value heads (A a multiple of K), D values a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward

import aot_fast.kernels as K
from aot_fast.defender import attention_kernels as kernels


class Layout(Protocol):
    """What a forward pass over no ordinary batch gives the attention layers: the keyword `layout` of the model."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[1, T, A, D] of q [1, A, T, D] and k, v [1, K, T, D], which are rotated already."""
        ...


def install(model: nn.Module, attention: str) -> None:
    """Let the text layers of `model` take a `layout`; without one they attend as they did, by `attention`.

    Once and for good: gradient checkpointing runs the layers again when the forward pass is long over.
    Raises ValueError for layers with sliding-window attention.
    """
    config = model.config.get_text_config()
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        raise ValueError("defender.model: its text layers have sliding-window attention; packing knows full attention only")
    plain = _plain_attention(attention)

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layout: Layout | None = None, **rest: Any):
        if layout is None:
            return plain(module, q, k, v, mask, **rest)
        return layout.attend(module.layer_idx, q, k, v, rest["scaling"]), None

    # transformers' flash attention looks its kernels up by the model's own setting: it keeps its name, also for models that pass no layout.
    name = attention if attention.startswith("flash") else f"aot_fast_{attention}"
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[attention])
    config._attn_implementation = name
    _fuse_rotary(sys.modules[type(model).__module__])


@lru_cache
def _plain_attention(attention: str) -> Callable:
    """What transformers has under this name; asked for before anything is registered in its place."""
    return eager_attention_forward if attention == "eager" else ALL_ATTENTION_FUNCTIONS[attention]


def _fuse_rotary(modeling: ModuleType) -> None:
    """Let the rotary embeddings of a module of transformers, of text and vision, run in one launch where Triton does."""
    if getattr(modeling, "_aot_fast_rotary", False):
        return
    plain, plain_vision = modeling.apply_rotary_pos_emb, modeling.apply_rotary_pos_emb_vision

    def text(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if _in_triton(q) and unsqueeze_dim == 1:
            return K.rotary(q, k, cos, sin)
        return plain(q, k, cos, sin, unsqueeze_dim)

    def vision(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        if _in_triton(q):  # [patches, heads, D]
            return tuple(x[0].transpose(0, 1) for x in K.rotary(*(x.transpose(0, 1)[None] for x in (q, k)), cos[None], sin[None]))
        return plain_vision(q, k, cos, sin)

    modeling.apply_rotary_pos_emb, modeling.apply_rotary_pos_emb_vision = text, vision
    modeling._aot_fast_rotary = True


def _in_triton(x: Tensor) -> bool:
    return x.is_cuda and x.dtype is not torch.float64 and K.backend_on(x.device) == "triton"


@dataclass(frozen=True)
class PackedRow:
    """The segments of a packed row: of each group the tokens of its prompt and of each response."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    device: torch.device
    attention: str
    """As defender.attention."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if self.attention == "flex_attention":
            return _flex()(q, k, v, block_mask=self.block_mask, scale=scale, enable_gqa=True).transpose(1, 2)
        if self.attention == "eager" or (q.is_cuda and q.dtype.itemsize > 2):  # flash attention on a GPU is for half precision
            return masked_attention(q, k, v, self.mask, scale).transpose(1, 2)
        return _SharedPrefix.apply(q, k, v, self, scale)

    @cached_property
    def starts(self) -> list[tuple[int, int, int]]:
        """Of each group: its first token, its first response's first token, the end."""
        starts, place = [], 0
        for prompt, responses in self.groups:
            starts.append((place, place + prompt, place + prompt + sum(responses)))
            place = starts[-1][2]
        return starts

    @cached_property
    def predicting(self) -> Tensor:
        """[response tokens] int64: the token of the row that predicts each of them, response after response."""
        places: list[int] = []
        for (_, begin, _), (_, responses) in zip(self.starts, self.groups):
            last = begin - 1
            for n in responses:
                places += [last, *range(begin, begin + n - 1)]
                begin += n
        return torch.tensor(places, dtype=torch.long, device=self.device)

    @cached_property
    def segments(self) -> Tensor:
        """[2, T] int64: of each token its segment, and the segment of its prompt."""
        own, prompt, count = [], [], 0
        for length, responses in self.groups:
            lengths = (length, *responses)
            own += [count + i for i, n in enumerate(lengths) for _ in range(n)]
            prompt += [count] * sum(lengths)
            count += len(lengths)
        return torch.tensor([own, prompt], device=self.device)

    @cached_property
    def mask(self) -> Tensor:
        """[T, T] bool: whether the token of the row attends to the token of the column. The definition; quadratic in memory."""
        own, prompt = self.segments
        causal = torch.ones(len(own), len(own), dtype=torch.bool, device=self.device).tril()
        return causal & ((own[:, None] == own) | (prompt[:, None] == own))

    @cached_property
    def block_mask(self) -> Any:
        """The same for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        own, prompt = self.segments

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & ((own[query] == own[key]) | (prompt[query] == own[key]))

        return create_block_mask(visible, None, None, len(own), len(own), device=self.device)

    @cached_property
    def folds(self) -> list[kernels.Fold]:
        """Of each group its responses as a batch."""
        return [kernels.fold_of(responses, self.device) for _, responses in self.groups]

    @cached_property
    def varlen(self) -> kernels.Varlen:
        """The segments as variable-length kernels take them."""
        return kernels.varlen_of(self.groups, self.device)


@lru_cache
def _flex():
    """FlexAttention, compiled on a GPU; on a CPU it has no backward pass."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if torch.cuda.is_available() else flex_attention


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[1, A, T, D], the plain path: q, k, v as Layout.attend takes them, mask [T, T] bool."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


class _SharedPrefix(torch.autograd.Function):
    """Own and past part, joined; [1, T, A, D] of q [1, A, T, D], k and v [1, K, T, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: PackedRow, scale: float) -> Tensor:
        run = kernels.varlen_forward if q.is_cuda else kernels.cpu_forward
        out, lse = run(q, k, v, row, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.row, ctx.scale = row, scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        run = kernels.varlen_backward if q.is_cuda else kernels.cpu_backward
        return *run(gradient.transpose(1, 2), q, k, v, out, lse, ctx.row, ctx.scale), None, None
