"""guided_velocity in Triton, and what the flow operators share: tiles, sums in a fixed order, guidance inside a kernel.

Bytes an element in bf16: 4 read and 4 written (the result is fp32); backward 8 read and 4 written. One launch each.

The same numbers are formed by kernels that are compiled apart, for other tensors, and must agree to the bit. So nothing here depends on
what the compiler is free to choose: sums are pairwise, two terms at a time, since the order inside a longer tl.sum follows from the layout
of the loads; and a product that a later addition could contract is written fma(x, y, 0).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import Build
from .flow_operators import fake_velocity, fake_velocity_gradient, guided_velocity_by

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

TILE = 1024
"""Elements a tile, at least: whole tokens where norms are taken. Eight a thread are one 128-bit load of bf16; with 16 a forward kernel that
has both v_ref and v_old spills."""
WARPS = 4


def tiling(shape: torch.Size, rescale: bool) -> tuple[int, dict[str, int]]:
    """Number of tiles of a sample of x [B, ...], and the sizes of one: TOKENS tokens of CHANNELS channels, padded to PAD."""
    channels = shape[-1] if rescale else TILE
    pad = triton.next_power_of_2(channels)
    tokens = max(1, TILE // pad)
    n = shape[1:].numel()
    assert n < 2**31 - 2**20, f"{n} elements a sample: offsets in a sample are int32"
    return triton.cdiv(n, tokens * channels), {"TOKENS": tokens, "CHANNELS": channels, "PAD": pad}


def num_warps(sizes: dict[str, int]) -> int:
    return min(16, WARPS * (sizes["TOKENS"] * sizes["PAD"] // TILE))


@triton.jit
def pairwise_sum(x, FROM: tl.constexpr, TO: tl.constexpr):
    """[FROM] -> [TO], sums of neighbours. Two terms have one order, so the bits do not depend on where the compiler put them."""
    for level in tl.static_range(31):
        if (FROM >> level) > TO:
            x = tl.sum(tl.reshape(x, [FROM >> (level + 1), 2]), axis=1)
    return x


@triton.jit
def tile_offsets(tile, n, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, PAD: tl.constexpr):
    """Offsets in the sample of a tile's TOKENS x PAD elements, and which of them exist."""
    index = tl.arange(0, TOKENS * PAD)
    if CHANNELS == PAD:
        offset = tile * (TOKENS * PAD) + index
        inside = offset < n
    else:
        offset = (tile * TOKENS + index // PAD) * CHANNELS + index % PAD
        inside = (index % PAD < CHANNELS) & (offset < n)
    return offset, inside


@triton.jit
def read(sample_base, offset, inside):
    return tl.load(sample_base + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norm(x, TOKENS: tl.constexpr, PAD: tl.constexpr):
    return tl.sqrt(pairwise_sum(tl.fma(x, x, 0.0), TOKENS * PAD, TOKENS))


@triton.jit
def _over(x, norm):
    """x / norm, 0 where the norm is not above TINY."""
    return tl.where(norm > TINY, x / tl.where(norm > TINY, norm, 1.0), 0.0)


@triton.jit
def _spread(per_token, TOKENS: tl.constexpr, PAD: tl.constexpr):
    return tl.reshape(tl.broadcast_to(tl.expand_dims(per_token, 1), [TOKENS, PAD]), [TOKENS * PAD])


@triton.jit
def guided(v, v_uncond, guidance, RESCALE: tl.constexpr, TOKENS: tl.constexpr, PAD: tl.constexpr):
    """The guided velocity of a tile, fp32."""
    u = tl.fma(guidance, v - v_uncond, v_uncond)
    if RESCALE:
        ratio = _over(_norm(v, TOKENS, PAD), _norm(u, TOKENS, PAD))
        u = tl.fma(u, _spread(ratio, TOKENS, PAD), 0.0)
    return u


@triton.jit
def guided_gradient(g, v, v_uncond, guidance, RESCALE: tl.constexpr, TOKENS: tl.constexpr, PAD: tl.constexpr):
    """(dL/dv, dL/dv_uncond) from g = dL/d(guided velocity) of a tile."""
    du = g
    along_v = tl.zeros_like(g)
    if RESCALE:
        u = tl.fma(guidance, v - v_uncond, v_uncond)
        m, n = _norm(u, TOKENS, PAD), _norm(v, TOKENS, PAD)
        direction = u * _spread(_over(1.0, m), TOKENS, PAD)
        along = pairwise_sum(tl.fma(g, direction, 0.0), TOKENS * PAD, TOKENS)
        du = tl.fma(_spread(-along, TOKENS, PAD), direction, g) * _spread(_over(n, m), TOKENS, PAD)
        along_v = v * _spread(_over(along, n), TOKENS, PAD)
    return tl.fma(guidance, du, along_v), (1.0 - guidance) * du


@triton.jit
def _guided_kernel(
    v, v_uncond, out, n, num_tiles, guidance, RESCALE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, PAD: tl.constexpr
):
    base = (tl.program_id(0) // num_tiles).to(tl.int64) * n
    offset, inside = tile_offsets(tl.program_id(0) % num_tiles, n, TOKENS, CHANNELS, PAD)
    velocity = guided(read(v + base, offset, inside), read(v_uncond + base, offset, inside), guidance, RESCALE, TOKENS, PAD)
    tl.store(out + base + offset, velocity, mask=inside)


@triton.jit
def _guided_backward_kernel(
    v,
    v_uncond,
    gradient,
    dv,
    dv_uncond,
    n,
    num_tiles,
    guidance,
    RESCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAD: tl.constexpr,
):
    base = (tl.program_id(0) // num_tiles).to(tl.int64) * n
    offset, inside = tile_offsets(tl.program_id(0) % num_tiles, n, TOKENS, CHANNELS, PAD)
    velocities = read(v + base, offset, inside), read(v_uncond + base, offset, inside)
    g, g_uncond = guided_gradient(read(gradient + base, offset, inside), velocities[0], velocities[1], guidance, RESCALE, TOKENS, PAD)
    tl.store(dv + base + offset, g.to(dv.dtype.element_ty), mask=inside)
    tl.store(dv_uncond + base + offset, g_uncond.to(dv_uncond.dtype.element_ty), mask=inside)


def _launch(kernel, tensors: list[Tensor], guidance: float, rescale: bool) -> None:
    """Runs a kernel over the tiles of contiguous tensors of one shape."""
    shape = tensors[0].shape if tensors[0].dim() > 1 else torch.Size((1, *tensors[0].shape))
    if shape.numel():
        num_tiles, sizes = tiling(shape, rescale)
        kernel[(shape[0] * num_tiles,)](
            *tensors, shape[1:].numel(), num_tiles, guidance, RESCALE=rescale, **sizes, num_warps=num_warps(sizes)
        )


@torch.library.custom_op("aot_fast::guided_velocity", mutates_args=())
def _guided(v: Tensor, v_uncond: Tensor, guidance: float, rescale: bool) -> Tensor:
    out = fake_velocity(v, v_uncond, guidance, rescale)
    _launch(_guided_kernel, [v.contiguous(), v_uncond.contiguous(), out], guidance, rescale)
    return out


_guided.register_fake(fake_velocity)


@torch.library.custom_op("aot_fast::guided_velocity_gradient", mutates_args=())
def _guided_gradient(v: Tensor, v_uncond: Tensor, gradient: Tensor, guidance: float, rescale: bool) -> tuple[Tensor, Tensor]:
    dv, dv_uncond = fake_velocity_gradient(v, v_uncond, gradient, guidance, rescale)
    _launch(_guided_backward_kernel, [*(t.contiguous() for t in (v, v_uncond, gradient)), dv, dv_uncond], guidance, rescale)
    return dv, dv_uncond


_guided_gradient.register_fake(fake_velocity_gradient)


def guided_velocity_triton(*arguments) -> Tensor:
    """As guided_velocity_reference."""
    return guided_velocity_by("aot_fast", *arguments)


def builds() -> list[Build]:
    """What ships, for the gates."""
    made = []
    for dtype in ("bf16", "fp32"):
        for rescale in (True, False):
            num_tiles, sizes = tiling(torch.Size((1, 4096, 64)), rescale)
            pointers = {"v": f"*{dtype}", "v_uncond": f"*{dtype}"}
            numbers = {"n": "i32", "num_tiles": "i32", "guidance": "fp32"}
            name = f"{'rescaled' if rescale else 'mixed'} {dtype}"
            for kernel, direction, more in (
                (_guided_kernel, "forward", {"out": "*fp32"}),
                (_guided_backward_kernel, "backward", {"gradient": "*fp32", "dv": f"*{dtype}", "dv_uncond": f"*{dtype}"}),
            ):
                arguments, constants = pointers | more | numbers, {"RESCALE": rescale, **sizes}
                made.append(
                    Build(f"guidance {direction} {name}", kernel, arguments, constants, num_warps(sizes), divisible=frozenset({"n"}))
                )
    return made
