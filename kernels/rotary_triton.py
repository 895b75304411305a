"""rotary in Triton: one program a token, all of its heads; one launch forward, one backward.

Bytes: q and k read and written once, a token's cosines and sines once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import Build


@triton.jit
def _row(base, lane, HALF: tl.constexpr):
    return tl.load(base + lane, mask=lane < HALF, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _rotate(
    x, out, cos, sin, token_base, out_base, head_stride,
    HEADS: tl.constexpr, PAD: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    head, lane = tl.arange(0, PAD), tl.arange(0, LANES)
    there = (head < HEADS)[:, None] & (lane < HALF)[None, :]
    source = x + token_base + head[:, None] * head_stride + lane[None, :]
    first = tl.load(source, mask=there, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=there, other=0.0).to(tl.float32)
    c1, c2 = _row(cos, lane, HALF), _row(cos + HALF, lane, HALF)
    s1, s2 = _row(sin, lane, HALF), _row(sin + HALF, lane, HALF)
    if BACKWARD:
        low, high = first * c1 + second * s2, second * c2 - first * s1
    else:
        low, high = first * c1 - second * s1, second * c2 + first * s2
    target = out + out_base + head[:, None] * (2 * HALF) + lane[None, :]
    tl.store(target, low, mask=there)
    tl.store(target + HALF, high, mask=there)


@triton.jit
def _rotary_kernel(
    q, k, cos, sin, q_out, k_out, num_tokens, q_batch, q_token, q_head, k_batch, k_token, k_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, Q_PAD: tl.constexpr, K_PAD: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    batch, token = place // num_tokens, place % num_tokens
    cos += place * (2 * HALF)
    sin += place * (2 * HALF)
    _rotate(q, q_out, cos, sin, batch * q_batch + token * q_token, place * HEADS * 2 * HALF, q_head, HEADS, Q_PAD, HALF, LANES, BACKWARD)
    _rotate(
        k, k_out, cos, sin, batch * k_batch + token * k_token, place * KV_HEADS * 2 * HALF, k_head, KV_HEADS, K_PAD, HALF, LANES, BACKWARD
    )


def sizes_of(heads: int, kv_heads: int, dim: int) -> dict[str, int]:
    """The kernel's constants."""
    pads = {"Q_PAD": triton.next_power_of_2(heads), "K_PAD": triton.next_power_of_2(kv_heads)}
    return {"HEADS": heads, "KV_HEADS": kv_heads, **pads, "HALF": dim // 2, "LANES": triton.next_power_of_2(dim // 2)}


def _num_warps(sizes: dict[str, int]) -> int:
    return max(1, min(8, sizes["Q_PAD"] * sizes["LANES"] // 256))  # two tiles of 8 elements a thread: 128-bit loads


@torch.library.custom_op("aot_fast::rotary", mutates_args=())
def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    made = _fake(q, k, cos, sin, backward)
    batch, heads, tokens, dim = q.shape
    if batch * tokens:
        sizes = sizes_of(heads, k.shape[1], dim)
        strides = [x.stride(i) for x in (q, k) for i in (0, 2, 1)]
        _rotary_kernel[(batch * tokens,)](
            q, k, cos.contiguous(), sin.contiguous(), *made, tokens, *strides, **sizes, BACKWARD=backward, num_warps=_num_warps(sizes)
        )
    return made


@_rotary.register_fake
def _fake(q, k, cos, sin, backward):
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:4])


def _gradient(ctx, dq: Tensor, dk: Tensor):
    return *_rotary(dq, dk, *ctx.saved_tensors, True), None, None, None


_rotary.register_autograd(_gradient, setup_context=_keep)


def rotary_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As rotary_reference."""
    return _rotary(q, k, cos, sin, False)


def builds() -> list[Build]:
    """What ships, for the gates."""
    made = []
    for name, dtype, heads, kv_heads, dim in (("3B", "bf16", 16, 2, 128), ("7B", "bf16", 28, 4, 128), ("small", "fp32", 4, 2, 32)):
        numbers = ("num_tokens", "q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head")
        arguments = {x: f"*{dtype}" for x in ("q", "k", "cos", "sin", "q_out", "k_out")} | dict.fromkeys(numbers, "i32")
        sizes = sizes_of(heads, kv_heads, dim)
        for backward in (False, True):
            build = f"rotary {'backward' if backward else 'forward'} {name}"
            multiples = frozenset(numbers[1:])
            made.append(
                Build(build, _rotary_kernel, arguments, sizes | {"BACKWARD": backward}, _num_warps(sizes), 1, multiples, dim >= 128)
            )
    return made
