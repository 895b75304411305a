"""philox.py inside Triton kernels: the same integers, and normals within 1e-6 of its fp64 evaluation.

tl.randn emits fp64 and stack, and tl.cos and tl.sin a range reduction with stack. Here the angle 2 pi t is reduced to an octant in its
bits, which is exact, and logarithm, cosine and sine are polynomials in fp32 (Chebyshev fits). A block of Philox gives four normals, whose
lanes are interleaved: about 23 instructions a normal for Box-Muller and 15 for Philox, and nothing is read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import Build
from .philox import MULTIPLIERS, ROUNDS, WEYL

M0, M1 = (tl.constexpr(m) for m in MULTIPLIERS)
W0, W1 = (tl.constexpr(w) for w in WEYL)
NUM_ROUNDS = tl.constexpr(ROUNDS)
LN2 = tl.constexpr(0.6931471805599453)
TWO_PI_HIGH = tl.constexpr(6.2831854820251465)
TWO_PI_LOW = tl.constexpr(-1.7484555e-07)

DRAW = (1024, 4)
"""Normals a program and warps of the kernel that only draws."""


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 words; key and counter broadcast together."""
    for _ in tl.static_range(NUM_ROUNDS):
        p0, p1 = c0.to(tl.uint64) * M0, c2.to(tl.uint64) * M1
        c0, c1, c2, c3 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32), (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + W0, k1 + W1
    return c0, c1, c2, c3


@triton.jit
def _radius(word):
    """sqrt(-2 ln u), u = word 2^-32 + 2^-33 = 2^i (1 - h / 2), |h| <= 2/3. Near u = 1, i is 0 and the polynomial's error relative."""
    bits = tl.fma(word.to(tl.float32), 2.0**-32, 2.0**-33).to(tl.int32, bitcast=True)
    scale = (bits - 0x3F2AAAAB) & -0x800000
    h = tl.fma((bits - scale).to(tl.float32, bitcast=True), -2.0, 2.0)
    p = tl.fma(h, 0.001148762064985931, 0.002555615734308958)
    p = tl.fma(h, p, 0.005168476607650518)
    p = tl.fma(h, p, 0.012444091029465199)
    p = tl.fma(h, p, 0.031252261251211166)
    p = tl.fma(h, p, 0.08333473652601242)
    y = tl.fma(h * h, tl.fma(h, p, 0.25), h)
    y = tl.fma(scale.to(tl.float32), -2.0 * LN2 * 2.0**-23, y)
    y = tl.maximum(y, 1e-30)  # u = 1: 1 / sqrt(0) is infinite
    inverse = tl.rsqrt(y)
    root = y * inverse
    return tl.fma(0.5 * inverse, tl.fma(-root, root, y), root)  # the approximate root is off by 1e-7: 8e-7 in a normal of 6.8


@triton.jit
def box_muller(k0, k1):
    """(z0, z1) of two words. t = (k1 >> 8) 2^-24 = q / 4 + f with |f| <= 1/8: w = 2^24 (t + 1/8) has q above its low 22 bits."""
    w = ((k1 >> 8) + 0x200000).to(tl.int32)
    f = ((w & 0x3FFFFF) | 0x3F000000).to(tl.float32, bitcast=True) - 0.625  # 2^-1 (1 + low bits 2^-23): no conversion, exact
    s = f * f
    sine = tl.fma(s, tl.fma(s, tl.fma(s, -75.72653198242188, 81.59952545166016), -41.341697692871094), TWO_PI_LOW)
    sine = tl.fma(f, TWO_PI_HIGH, f * sine)
    cosine = tl.fma(s, tl.fma(s, tl.fma(s, 59.424224853515625, -85.44882202148438), 64.93936920166016), -19.739208221435547)
    cosine = tl.fma(s, cosine, 1.0)
    half_turn = (w << 8) & -0x80000000  # the sign
    radius = (_radius(k0).to(tl.int32, bitcast=True) ^ half_turn).to(tl.float32, bitcast=True)
    odd = (w & 0x400000) != 0  # a quarter turn
    return radius * tl.where(odd, -sine, cosine), radius * tl.where(odd, cosine, sine)


@triton.jit
def _block_normals(seed, block):
    """The four lanes of Philox blocks (int32, not negative)."""
    zero = tl.zeros_like(block).to(tl.uint32)
    k0, k1, k2, k3 = philox4x32(block.to(tl.uint32), zero, zero, zero, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    z0, z1 = box_muller(k0, k1)
    z2, z3 = box_muller(k2, k3)
    return z0, z1, z2, z3


@triton.jit
def consecutive_normals(seed, first, COUNT: tl.constexpr, TOGETHER: tl.constexpr):
    """Normals of elements first .. first + COUNT - 1 of a sample, multiples of 4.

    TOGETHER: blocks of four that a thread holds side by side in the tile, 2 for 16-bit tensors, 1 for fp32. Of a range a thread owns every
    128th entry. So the blocks are drawn in that order and only transposed to the tile's, which moves nothing; otherwise each normal goes
    through shared memory.
    """
    GROUPS: tl.constexpr = COUNT // 4 // TOGETHER
    index = tl.arange(0, COUNT // 4)
    z0, z1, z2, z3 = _block_normals(seed, first // 4 + TOGETHER * (index % GROUPS) + index // GROUPS)
    z = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    return tl.reshape(tl.trans(tl.reshape(z, [TOGETHER, GROUPS, 4]), (1, 0, 2)), [COUNT])


@triton.jit
def element_normals(seed, element):
    """Normals of any elements; draws four for each, since their lanes are not together."""
    z0, z1, z2, z3 = _block_normals(seed, element // 4)
    lane = element % 4
    return tl.where(lane < 2, tl.where(lane == 0, z0, z1), tl.where(lane == 2, z2, z3))


@triton.jit
def _draw_kernel(seeds, normals, count, blocks_per_row, BLOCK: tl.constexpr):
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    first = (tl.program_id(0) % blocks_per_row) * BLOCK
    z = consecutive_normals(tl.load(seeds + row), first, BLOCK, 1)
    element = first + tl.arange(0, BLOCK)
    tl.store(normals + row * count + element, z, mask=element < count)


def philox_normal_triton(seeds: Tensor, count: int) -> Tensor:
    """As philox_normal, with the normals that flow_step draws under this backend: equal to the reference's within 1e-6."""
    normals = torch.empty((len(seeds), count), dtype=torch.float32, device=seeds.device)
    block, num_warps = DRAW
    blocks_per_row = triton.cdiv(count, block)
    if normals.numel():
        _draw_kernel[(len(seeds) * blocks_per_row,)](seeds.contiguous(), normals, count, blocks_per_row, BLOCK=block, num_warps=num_warps)
    return normals


def builds() -> list[Build]:
    """What ships, for the gates."""
    arguments = {"seeds": "*i64", "normals": "*fp32", "count": "i32", "blocks_per_row": "i32"}
    return [Build("philox normals", _draw_kernel, arguments, {"BLOCK": DRAW[0]}, DRAW[1], divisible=frozenset({"count"}), wide_loads=False)]
