"""decode_attention in Triton, two launches: each split of a prompt against all rows that share it, then each row against its own tokens,
joined with the splits by their log-sum-exps.

Bytes: keys and values once, and the splits' partial results (fp32, S A D of them a split, written and read). Scores and sums are fp32;
weights are rounded to the values' dtype for the product, as flash attention does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import Build

LOG2E = 1.4426950408889634
INF = tl.constexpr(float("inf"))

KEYS = 64
"""Keys a tile."""
QUERIES = 64
"""Queries a program at most; more than that read their prompt again, out of the cache."""
PROGRAMS = 132
"""Programs that the splits of all prompts should make: one on each multiprocessor of a H100 or H200. More splits, more to put together."""
STAGES = {2: 3, 4: 2}
"""Tiles on their way to a program, by the bytes of an element: in fp32 three of 128 values a head would not fit an A100."""


def sizes_of(members: torch.Size, heads: int, kv_heads: int, dim: int, room: int) -> dict[str, int]:
    """Constants of both kernels. No tile smaller than 16: tl.dot's least."""
    places, group = members
    repeat = heads // kv_heads
    queries = min(QUERIES, max(16, triton.next_power_of_2(group * repeat)))
    busy = max(1, places // 2) * kv_heads * triton.cdiv(group * repeat, queries)  # a rollout keeps half of its places free
    splits = max(1, min(triton.cdiv(PROGRAMS, busy), triton.cdiv(room, 4 * KEYS), 64))
    sizes = {
        "GROUP": group,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "REPEAT": repeat,
        "DIM": dim,
        "PAD": max(16, triton.next_power_of_2(dim)),
    }
    return sizes | {"QUERIES": queries, "KEYS": KEYS, "SPLITS": splits, "SPLIT_PAD": triton.next_power_of_2(splits)}


@triton.jit
def _attend(query, keys, values, first, end, highest, total, mean, scale, DIM: tl.constexpr, PAD: tl.constexpr, KEYS: tl.constexpr):
    """Goes on with an online softmax, in powers of two, over the keys first..end: its maximum [M], sum [M], weighted values [M, PAD]."""
    lane = tl.arange(0, PAD)
    for start in range(first, end, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = (key < end)[:, None] & (lane < DIM)[None, :]
        offset = key[:, None] * DIM + lane[None, :]
        k = tl.load(keys + offset, mask=inside, other=0.0)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        score = tl.where((key < end)[None, :], score, -INF)
        higher = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(highest - higher)
        v = tl.load(values + offset, mask=inside, other=0.0)
        total = total * shrink + tl.sum(weight, 1)
        mean = mean * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        highest = higher
    return highest, total, mean


@triton.jit
def _prompt_kernel(
    q, prompts, lengths, members, part, part_lse, scale, room, values,
    GROUP: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_PAD: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (GROUP * REPEAT + QUERIES - 1) // QUERIES
    place, head, split = tl.program_id(0) // BLOCKS, tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) % BLOCKS * QUERIES + tl.arange(0, QUERIES)
    lane = tl.arange(0, PAD)
    slot = tl.load(members + place * GROUP + row // REPEAT, mask=row < GROUP * REPEAT, other=-1)
    if tl.max(slot, 0) >= 0:
        length = tl.load(lengths + place)
        share = tl.cdiv(tl.cdiv(length, KEYS), SPLITS) * KEYS
        first = tl.minimum(split * share, length)
        live = (slot >= 0)[:, None] & (lane < DIM)[None, :]
        query = tl.load(q + (slot * HEADS + head * REPEAT + row % REPEAT)[:, None] * DIM + lane[None, :], mask=live, other=0.0)
        base = prompts + (place * KV_HEADS + head).to(tl.int64) * room * DIM
        highest, total, mean = _attend(
            query, base, base + values, first, tl.minimum(first + share, length),
            tl.full([QUERIES], -1e30, tl.float32), tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES, PAD], tl.float32), scale,
            DIM, PAD, KEYS,
        )  # fmt: skip
        # A split beyond the end has a total of 0: its log-sum-exp is so low that it counts for nothing.
        place_of_row = ((place * KV_HEADS + head) * SPLITS + split) * (GROUP * REPEAT) + row
        tl.store(part_lse + place_of_row, highest + tl.log2(tl.maximum(total, 1e-30)), mask=row < GROUP * REPEAT)
        there = (row < GROUP * REPEAT)[:, None] & (lane < DIM)[None, :]
        tl.store(part + place_of_row[:, None] * DIM + lane[None, :], mean / tl.maximum(total, 1e-30)[:, None], mask=there)


@triton.jit
def _row_kernel(
    q, k, v, own, members, steps, part, part_lse, out, scale, room, values, k_stride, v_stride,
    GROUP: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_PAD: tl.constexpr,
):  # fmt: skip
    place, head = tl.program_id(0) // GROUP, tl.program_id(1)
    slot = tl.load(members + tl.program_id(0))
    if slot >= 0:
        lane, row = tl.arange(0, PAD), tl.arange(0, QUERIES)
        step = tl.load(steps + slot)
        there = (row < REPEAT)[:, None] & (lane < DIM)[None, :]
        offset = (slot * HEADS + head * REPEAT + row)[:, None] * DIM + lane[None, :]
        query = tl.load(q + offset, mask=there, other=0.0)
        new_key = tl.load(k + slot * k_stride + head * DIM + lane, mask=lane < DIM, other=0.0)
        new_value = tl.load(v + slot * v_stride + head * DIM + lane, mask=lane < DIM, other=0.0)
        keys = own + (slot * KV_HEADS + head).to(tl.int64) * room * DIM
        tl.store(keys + step * DIM + lane, new_key, mask=lane < DIM)
        tl.store(keys + values + step * DIM + lane, new_value, mask=lane < DIM)
        # The new token first: what was just stored is not read again.
        highest = tl.sum(query.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
        mean = tl.zeros([QUERIES, PAD], tl.float32) + new_value.to(tl.float32)[None, :]
        highest, total, mean = _attend(
            query, keys, keys + values, 0, step, highest, tl.full([QUERIES], 1.0, tl.float32), mean, scale, DIM, PAD, KEYS
        )
        # All log-sum-exps first: then no split has to wait for the one before.
        splits = tl.arange(0, SPLIT_PAD)
        row_of_split = (place * KV_HEADS + head) * SPLITS * (GROUP * REPEAT) + tl.program_id(0) % GROUP * REPEAT + row
        known = (splits < SPLITS)[:, None] & (row < REPEAT)[None, :]
        lse = tl.load(part_lse + splits[:, None] * (GROUP * REPEAT) + row_of_split[None, :], mask=known, other=-1e30)
        higher = tl.maximum(highest, tl.max(lse, 0))
        kept = tl.exp2(highest - higher)
        total = total * kept + tl.sum(tl.exp2(lse - higher[None, :]), 0)
        mean = mean * kept[:, None]
        for split in tl.range(0, SPLITS, loop_unroll_factor=4):
            place_of_row = row_of_split + split * (GROUP * REPEAT)
            weight = tl.exp2(tl.load(part_lse + place_of_row, mask=row < REPEAT, other=-1e30) - higher)
            mean += tl.load(part + place_of_row[:, None] * DIM + lane[None, :], mask=there, other=0.0) * weight[:, None]
        tl.store(out + offset, mean / total[:, None], mask=there)


@torch.library.custom_op("aot_fast::decode_attention", mutates_args={"own"})
def _decode_attention(
    q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, own: Tensor, lengths: Tensor, members: Tensor, steps: Tensor, scale: float
) -> Tensor:
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    places, group = members.shape
    kv_heads, room, dim = prompts.shape[2:]
    sizes = sizes_of(members.shape, q.shape[1], kv_heads, dim, room)
    splits, repeat, queries = (sizes[name] for name in ("SPLITS", "REPEAT", "QUERIES"))
    assert out.numel() < 2**31, "offsets of queries are int32"
    part = torch.empty(places, kv_heads, splits, group * repeat, dim, dtype=torch.float32, device=q.device)
    assert part.numel() < 2**31, "offsets of partial results are int32"
    part_lse = torch.empty(part.shape[:-1], dtype=torch.float32, device=q.device)
    q, (k, k_stride), (v, v_stride) = q.contiguous(), _rows(k), _rows(v)
    _prompt_kernel[(places * triton.cdiv(group * repeat, queries), kv_heads, splits)](
        q,
        prompts,
        lengths,
        members,
        part,
        part_lse,
        scale * LOG2E,
        room,
        prompts.stride(0),
        **sizes,
        num_warps=4,
        num_stages=STAGES[q.dtype.itemsize],
    )
    sizes["QUERIES"] = max(16, triton.next_power_of_2(repeat))
    _row_kernel[(places * group, kv_heads)](
        q, k, v, own, members, steps, part, part_lse, out, scale * LOG2E, own.shape[3], own.stride(0), k_stride, v_stride, **sizes,
        num_warps=4, num_stages=STAGES[q.dtype.itemsize],
    )  # fmt: skip
    return out


@_decode_attention.register_fake
def _(q, k, v, prompts, own, lengths, members, steps, scale):
    return q.new_empty(q.shape)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x [S, K, D] with heads that follow each other, and the elements from row to row."""
    x = x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
    return x, x.stride(0)


def decode_attention_triton(*arguments) -> Tensor:
    """As decode_attention_reference."""
    return _decode_attention(*arguments)


def builds() -> list[Build]:
    """What ships, for the gates: Qwen2.5-VL 3B and 7B, and a small model in fp32."""
    made = []
    for name, dtype, heads, kv_heads, dim in (("3B", "bf16", 16, 2, 128), ("7B", "bf16", 28, 4, 128), ("small", "fp32", 4, 2, 32)):
        sizes = sizes_of(torch.Size((16, 8)), heads, kv_heads, dim, 5504)
        floats = {
            "q": f"*{dtype}",
            "part": "*fp32",
            "part_lse": "*fp32",
            "scale": "fp32",
            "members": "*i32",
            "room": "i32",
            "values": "i32",
        }
        prompt = floats | {"prompts": f"*{dtype}", "lengths": "*i32"}
        row = floats | {x: f"*{dtype}" for x in ("k", "v", "own", "out")} | {"steps": "*i32"} | {x: "i32" for x in ("k_stride", "v_stride")}
        own = sizes | {"QUERIES": max(16, triton.next_power_of_2(heads // kv_heads))}
        for part, kernel, arguments, constants in (("prompts", _prompt_kernel, prompt, sizes), ("rows", _row_kernel, row, own)):
            multiples = frozenset({"room", "values", "k_stride", "v_stride"} & arguments.keys())
            made.append(
                Build(f"decode {part} {name}", kernel, arguments, constants, 4, STAGES[2 if dtype == "bf16" else 4], divisible=multiples)
            )
    return made
