"""Floating-point operations of the Defender, from its configuration and the lengths of what it reads and writes.

Unit: FLOPs; a multiply-add counts 2. Counted is every matrix product: linear layers, patch embedding, Q K^T and P V. Not counted: norms,
softmax, rotary embedding, activations, biases, look-ups, sampling. Padding is no work, nor is decoding a row that has ended.
These are the model's FLOPs, each once, and not the hardware's: the forward pass that gradient checkpointing runs again, and the scores
that a fused attention forms again in its backward pass, are run and not counted.
Shared work is what a group needs: its images and its prompt once, every response once. Nominal work is what the same group costs when
nothing is shared: images and prompt once per response. Never mix the two in one figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

VISION_MLP_MATRICES = {"qwen2_5_vl": 3, "qwen3_vl": 2}
"""By model_type: gate, up and down, or two layers. Both text models have gate, up and down."""

PEAK_BF16 = {
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA A100": 312e12,
}
"""Dense FLOP/s by the start of a card's name, the first that fits; half of what NVIDIA's data sheets give with sparsity."""
SLOWER = (" NVL", " MIG ")
"""In the names of cards and slices of cards that begin like a faster one's."""


@dataclass(frozen=True)
class GroupShape:
    """One prompt and its responses, as lengths."""

    images: tuple[tuple[int, int, int], ...]
    """(frames, rows, columns) of patches, a row of image_grid_thw for each image; patches before they are merged to tokens."""
    prompt: int
    """Tokens of the prompt, those of its images included."""
    responses: tuple[int, ...]
    """Tokens of each response, the stop token included."""

    @classmethod
    def of(cls, grid: Any, prompt: int, responses: Iterable[int]) -> GroupShape:
        """As the constructor, with `grid` an integer tensor [images, 3] or anything that iterates over triples."""
        rows = grid.tolist() if hasattr(grid, "tolist") else grid
        return cls(tuple((int(t), int(h), int(w)) for t, h, w in rows), int(prompt), tuple(int(n) for n in responses))

    def unshared(self) -> list[GroupShape]:
        """A group of its own for every response."""
        return [GroupShape(self.images, self.prompt, (n,)) for n in self.responses]


@dataclass(frozen=True)
class Flops:
    """Work in FLOPs, by part of the model."""

    vision: int = 0
    """The whole tower: patch embedding, blocks, mergers."""
    linear: int = 0
    """q, k, v, o, gate, up, down of the text model."""
    attention: int = 0
    """Q K^T and P V of the text model, for the keys that a token sees."""
    head: int = 0

    @property
    def total(self) -> int:
        return self.vision + self.linear + self.attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.vision + other.vision, self.linear + other.linear, self.attention + other.attention, self.head + other.head)


class _Passes(NamedTuple):
    """How many times its forward FLOPs each part costs."""

    patch_embedding: int = 1
    vision_linear: int = 1
    vision_attention: int = 1
    linear: int = 1
    attention: int = 1
    head: int = 1


def forward_flops(config: PreTrainedConfig, groups: Iterable[GroupShape], shared: bool = True) -> Flops:
    """FLOPs of one forward pass that gives the log-prob of every response token: a pass of the reference, or the first third of training.

    config: of Qwen2.5-VL or Qwen3-VL. The head runs on one row a response token. A response's last token is read like the others, although
    nothing is predicted from it. Raises ValueError for another architecture, sliding windows, or lengths that do not fit.
    """
    return _forward(config, groups, shared, _Passes())


def update_flops(
    config: PreTrainedConfig, groups: Iterable[GroupShape], shared: bool = True, train_vision: bool = True, lora: bool = False
) -> Flops:
    """FLOPs of forward and backward on `groups`, as if every response token had a gradient. Raises as forward_flops.

    A trained matrix costs 3 forwards: itself, its input's gradient and its own; the fused head likewise. One that LoRA freezes costs 2, for
    gradients flow through it; attention costs 3 in either case. Pixels need no gradient: the patch embedding costs 2 trained, 1 frozen. A
    tower that is not trained costs its forward. Neglected under LoRA: the adapters' own products (about 3 rank / width of a square matrix),
    and that nothing flows back past the first adapter (less than one layer of either stack).
    """
    own = 0 if lora else 1  # the weights' gradients
    passes = _Passes(linear=2 + own, attention=3, head=2 + own)
    if train_vision:
        passes = passes._replace(patch_embedding=1 + own, vision_linear=2 + own, vision_attention=3)
    return _forward(config, groups, shared, passes)


def rollout_flops(config: PreTrainedConfig, groups: Iterable[GroupShape], shared: bool = True) -> Flops:
    """FLOPs of sampling the responses: the prompt is prefilled, then each token attends to prompt and own keys. Raises as forward_flops.

    The first token comes from the prompt's last row, one row of the head for the group. A response's last token is drawn, never read.
    """
    work = Flops()
    for group in _checked(config, groups, shared):
        read = [n - 1 for n in group.responses]
        work += _group_flops(config, group, read, 1 + sum(read), _Passes())
    return work


def mfu(flops: float, seconds: float, device_name: str) -> float | None:
    """Share of a card's dense bf16 peak that `flops` (one card's) in `seconds` make, 1.0 at most; None for a card without a known peak.

    device_name: as torch.cuda.get_device_name gives it. No peak is known of a MIG slice, an NVL card, a CPU.
    """
    known = [peak for prefix, peak in PEAK_BF16.items() if device_name.startswith(prefix)]
    if not known or any(mark in device_name for mark in SLOWER):
        return None
    return flops / seconds / known[0]


def _forward(config: PreTrainedConfig, groups: Iterable[GroupShape], shared: bool, passes: _Passes) -> Flops:
    checked = _checked(config, groups, shared)
    return sum((_group_flops(config, group, group.responses, sum(group.responses), passes) for group in checked), Flops())


def _checked(config: PreTrainedConfig, groups: Iterable[GroupShape], shared: bool) -> list[GroupShape]:
    if config.model_type not in VISION_MLP_MATRICES:
        raise ValueError(f"model_type {config.model_type!r}: FLOPs are known for {', '.join(VISION_MLP_MATRICES)} only")
    if getattr(config.text_config, "sliding_window", None):
        raise ValueError("use_sliding_window: FLOPs are counted for full causal attention only; set it to False")
    merge, groups = config.vision_config.spatial_merge_size, list(groups)
    for group in groups:
        if any(rows % merge or columns % merge for _, rows, columns in group.images):
            raise ValueError(f"{group}: rows and columns of patches must be multiples of spatial_merge_size = {merge}")
        tokens = sum(t * h * w for t, h, w in group.images) // merge**2
        if group.prompt < max(tokens, 1):
            raise ValueError(f"{group}: the prompt needs at least {max(tokens, 1)} tokens; count those of its images too")
        if min(group.responses, default=0) < 1:
            raise ValueError(f"{group}: expected one response or more, each of one token or more")
    return groups if shared else [single for group in groups for single in group.unshared()]


def _group_flops(config: PreTrainedConfig, group: GroupShape, read: Sequence[int], head_rows: int, passes: _Passes) -> Flops:
    """`read`: how many tokens of each response pass through the text model, each seeing the prompt and the response up to itself."""
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    weights = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    pairs = _causal(group.prompt) + sum(n * group.prompt + _causal(n) for n in read)
    embedding, vision_linear, vision_attention = _vision(config, group.images)
    return Flops(
        vision=passes.patch_embedding * embedding + passes.vision_linear * vision_linear + passes.vision_attention * vision_attention,
        linear=passes.linear * 2 * text.num_hidden_layers * weights * (group.prompt + sum(read)),
        attention=passes.attention * 4 * text.num_hidden_layers * queries * pairs,  # 2 products of 2 FLOPs per query, key and channel
        head=passes.head * 2 * text.hidden_size * text.vocab_size * head_rows,
    )


def _causal(n: int) -> int:
    """(query, key) pairs of n tokens that each see themselves and what came before."""
    return n * (n + 1) // 2


def _vision(config: PreTrainedConfig, images: Sequence[tuple[int, int, int]]) -> tuple[int, int, int]:
    """FLOPs of patch embedding, linear layers (blocks and mergers) and attention. No token of one frame sees another frame."""
    vision = config.vision_config
    width, merge = vision.hidden_size, vision.spatial_merge_size
    patches = sum(t * h * w for t, h, w in images)
    block = width * (4 * width + VISION_MLP_MATRICES[config.model_type] * vision.intermediate_size)  # 4: q, k, v and projection
    merged = width * merge**2
    mergers = 1 + sum(i < vision.depth for i in getattr(vision, "deepstack_visual_indexes", ()))
    linear = 2 * (vision.depth * patches * block + mergers * (patches // merge**2) * merged * (merged + vision.out_hidden_size))
    num_full = sum(i in getattr(vision, "fullatt_block_indexes", range(vision.depth)) for i in range(vision.depth))
    pairs = num_full * sum(t * (h * w) ** 2 for t, h, w in images)
    if num_full < vision.depth:
        side = vision.window_size // merge // vision.patch_size * merge  # in patches, rounded as get_vision_window_index does
        pairs += (vision.depth - num_full) * sum(t * _squares(h, side) * _squares(w, side) for t, h, w in images)
    embedding = 2 * patches * width * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return embedding, linear, 4 * width * pairs


def _squares(length: int, side: int) -> int:
    """Sum of squared lengths of the pieces that windows of `side` cut from `length`. Of rows times of columns: the pairs within windows."""
    return length // side * side**2 + (length % side) ** 2
