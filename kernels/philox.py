"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), keyed by a sample's seed and an element's index.

Element e of a sample with seed s is lane e % 4 of the block with key (s & 0xffffffff, s >> 32) and counter (e // 4, 0, 0, 0) with the
block's upper half in the second word. The integers are the same on every backend and device, in any batch and in any order. Normals by
Box-Muller, per pair of lanes (k0, k1):

    u = k0 2^-32 + 2^-33 in (0, 1], t = (k1 >> 8) 2^-24 in [0, 1);    z0 = sqrt(-2 ln u) cos(2 pi t),  z1 = sqrt(-2 ln u) sin(2 pi t)

u and t are fp32 numbers; the functions are evaluated in fp64 and rounded to fp32, so that a vector library's last bit, which may depend on
where an element lies in memory, does not show. |z| <= 6.8. Bytes: 4 written an element, nothing read.
"""

import math

import torch
from torch import Tensor

from .arguments import require, require_tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32. All words are int64 tensors in [0, 2^32) that broadcast together; so are the four results."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps to the low 64 bits of the exact one, and the masks make its halves unsigned again.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + WEYL[0] & MASK, k1 + WEYL[1] & MASK
    return c0, c1, c2, c3


def philox_normal(seeds: Tensor, count: int) -> Tensor:
    """Standard normals [B, count], fp32: row i depends on seeds[i] alone, and is a prefix of a longer row.

    seeds: int64 [B], any value. Raises ValueError on another dtype or shape, or a negative count.
    """
    require_tensor("seeds", seeds, (None,), (torch.int64,))
    require(count >= 0, "count", count, "at least 0")
    return torch.stack([_normals(seed, count) for seed in seeds]) if len(seeds) else seeds.new_zeros((0, count), dtype=torch.float32)


def _normals(seed: Tensor, count: int) -> Tensor:
    """One sample at a time: the int64 temporaries are 16 times the result."""
    block = torch.arange((count + 3) // 4, device=seed.device)
    zero = torch.zeros_like(block)
    k0, k1, k2, k3 = philox4x32((block & MASK, block >> 32, zero, zero), (seed & MASK, seed >> 32 & MASK))
    return torch.stack([*_box_muller(k0, k1), *_box_muller(k2, k3)], dim=-1).flatten()[:count].float()


def _box_muller(k0: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
    u = k0.float() * 2.0**-32 + 2.0**-33
    t = (k1 >> 8).float() * 2.0**-24
    radius = torch.sqrt(-2 * torch.log(u.double()))
    angle = 2 * math.pi * t.double()
    return radius * torch.cos(angle), radius * torch.sin(angle)
