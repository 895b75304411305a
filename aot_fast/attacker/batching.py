"""What shares a forward pass: things of equal shape, so many at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, TypeVar

from aot_fast.config import AttackerConfig

if TYPE_CHECKING:
    from aot_fast.attacker.encoding import Encoding

T = TypeVar("T")


def batches(items: Sequence[T], size: int | Callable[[list[T]], int], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Split into batches of at most `size` items with equal `key`, in order of first appearance: only equal shapes share a forward.

    size: a number, or that of a list of items with equal key.
    """
    buckets: dict[Hashable, list[T]] = {}
    for item in items:
        buckets.setdefault(key(item), []).append(item)
    made = []
    for bucket in buckets.values():
        step = size(bucket) if callable(size) else size
        made += [bucket[i : i + step] for i in range(0, len(bucket), step)]
    return made


def num_pairs(config: AttackerConfig, encodings: Sequence[Encoding]) -> int:
    """(sample, step) pairs of these encodings' shapes in one forward and backward: `tokens_per_microbatch` full, or `microbatch`."""
    if not config.tokens_per_microbatch:
        return config.microbatch
    return max(1, config.tokens_per_microbatch // max(e.num_tokens for e in encodings))
