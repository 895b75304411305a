"""group_advantage in Triton: two launches, the equation of group_advantage.py.

Launch 1 takes blocks of rewards and of sizes: sums of sizes (from which launch 2 finds where a group starts), the number of rewards that
are not finite, and for std="batch" the sums of R - c and (R - c)^2, c the first finite reward of the first block. Launch 2, one program a
group: with d = R - min, exact by two-sum,

    mean = sum d / n,   variance = (sum d^2 - (sum d)^2 / n) / (n - ddof)

The difference loses a factor (range / std)^2 <= 2 n, so sums, products, quotients and the root are numbers of two floats each (44 bits or
more): the advantage is rounded once, as by the reference in fp64. Every sum is in a fixed order. Squares of differences must fit in fp32.

Bytes: 4 read and 4 written a reward. Floor: a launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import Build
from .group_advantage import Advantage
from .policy_operators import empty_advantage

INF = tl.constexpr(float("inf"))

SURVEY = (256, 1)
"""Elements a block and warps: 8 a thread, for 128-bit loads; one warp reduces without a barrier."""
GROUP = (32, 1)
"""As many lanes as a warp: most groups have 4 to 32 samples. Larger groups and the blocks of launch 1 are looped over."""
NUM_MOMENTS = 5
"""Rows of the partial moments: count, sum and its low part, sum of squares and its low part."""


@triton.jit
def _add(a, a_low, b, b_low):
    """Sum of two numbers of two floats each: Knuth's two-sum, then renormalised. Additions only, which no compiler fuses."""
    s = a + b
    t = s - a
    low = ((a - (s - t)) + (b - t)) + (a_low + b_low)
    high = s + low
    return high, low - (high - s)


@triton.jit
def _halves(x):
    """x as a sum of two numbers of 12 bits: products of such are exact in fp32, so that fusing them into an fma changes nothing."""
    high = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _product(x, y):
    """x y as two floats."""
    a, b = _halves(x)
    c, d = _halves(y)
    return _add(a * c, 0.0, a * d + b * c, b * d)


@triton.jit
def _residual(a, x, y):
    """a - x y without the rounding of the product."""
    b, c = _halves(x)
    d, e = _halves(y)
    return ((a - b * d) - b * e - c * d) - c * e


@triton.jit
def _quotient(a, a_low, b, b_low):
    """a / b as two floats: one Newton step on the approximate division."""
    q = a / b
    return q, (_residual(a, q, b) + a_low - q * b_low) / b


@triton.jit
def _deviation(count, s, s_low, q, q_low, ddof):
    """Standard deviation as two floats, from a count of at least 1, the sum and the sum of squares."""
    mean, mean_low = _quotient(s, s_low, count, 0.0)
    p, p_low = _product(s, mean)
    m, m_low = _add(q, q_low, -p, -(p_low + s * mean_low + s_low * mean))
    v, v_low = _quotient(m, m_low, tl.maximum(count - ddof, 1.0), 0.0)
    root = tl.sqrt(tl.maximum(v, 0.0))
    return root, tl.where(root > 0.0, (_residual(v, root, root) + v_low) / (2.0 * root), 0.0)


@triton.jit
def _load_rewards(rewards, index, inside):
    r = tl.load(rewards + index, mask=inside, other=INF)
    finite = tl.abs(r) < INF  # false for NaN
    return tl.where(finite, r, 0.0), finite


@triton.jit
def _centred(r, finite, pivot):
    """r - pivot as two floats, exact; 0 where not finite."""
    return _add(tl.where(finite, r, pivot), 0.0, -pivot, 0.0)


@triton.jit
def _accumulate(d, d_low, s, s_low, q, q_low):
    """Adds d to s and d^2 to q, lane by lane."""
    square, square_low = _product(d, d)
    s, s_low = _add(s, s_low, d, d_low)
    q, q_low = _add(q, q_low, square, square_low + 2.0 * d * d_low)
    return s, s_low, q, q_low


@triton.jit
def _survey_kernel(
    rewards, sizes, size_sums, nonfinite, moments, num_rewards, num_groups, num_blocks, BATCH: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    index = block.to(tl.int64) * BLOCK + lanes
    tl.store(size_sums + block, tl.sum(tl.load(sizes + index, mask=index < num_groups, other=0), axis=0))
    inside = index < num_rewards
    r, finite = _load_rewards(rewards, index, inside)
    tl.store(nonfinite + block, tl.sum((inside & (finite == 0)).to(tl.int32), axis=0))
    if BATCH:
        first, usable = _load_rewards(rewards, lanes, lanes < num_rewards)
        chosen = lanes == tl.min(tl.where(usable, lanes, BLOCK), axis=0)
        d, d_low = _centred(r, finite, tl.sum(tl.where(chosen, first, 0.0), axis=0))
        zero = tl.zeros([BLOCK], tl.float32)
        d, d_low, q, q_low = _accumulate(d, d_low, zero, zero, zero, zero)
        s, s_low = tl.reduce((d, d_low), 0, _add)
        q, q_low = tl.reduce((q, q_low), 0, _add)
        out = moments + block
        tl.store(out, tl.sum(finite.to(tl.float32), axis=0))
        tl.store(out + num_blocks, s)
        tl.store(out + 2 * num_blocks, s_low)
        tl.store(out + 3 * num_blocks, q)
        tl.store(out + 4 * num_blocks, q_low)


@triton.jit
def _batch_deviation(moments, num_blocks, ddof, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.float32)
    s, s_low, q, q_low = count, count, count, count
    for first in range(0, num_blocks, BLOCK):
        row = moments + first + lanes
        inside = first + lanes < num_blocks
        count += tl.load(row, mask=inside, other=0.0)
        t, t_low = tl.load(row + num_blocks, mask=inside, other=0.0), tl.load(row + 2 * num_blocks, mask=inside, other=0.0)
        p, p_low = tl.load(row + 3 * num_blocks, mask=inside, other=0.0), tl.load(row + 4 * num_blocks, mask=inside, other=0.0)
        s, s_low = _add(s, s_low, t, t_low)
        q, q_low = _add(q, q_low, p, p_low)
    s, s_low = tl.reduce((s, s_low), 0, _add)
    q, q_low = tl.reduce((q, q_low), 0, _add)
    return _deviation(tl.sum(count, axis=0), s, s_low, q, q_low, ddof)


@triton.jit
def _int_sum(values, first, stop, BLOCK: tl.constexpr):
    """Sum of values[first:stop], int64."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(first, stop, BLOCK):
        total += tl.load(values + start + lanes, mask=start + lanes < stop, other=0).to(tl.int64)
    return tl.sum(total, axis=0)


@triton.jit
def _group_kernel(
    rewards,
    sizes,
    size_sums,
    nonfinite,
    moments,
    values,
    degenerate,
    num_nonfinite,
    num_rewards,
    num_blocks,
    eps,
    ddof,
    STD: tl.constexpr,
    BLOCK: tl.constexpr,
    SURVEY_BLOCK: tl.constexpr,
):
    group = tl.program_id(0)
    if group == 0:
        tl.store(num_nonfinite, _int_sum(nonfinite, 0, num_blocks, SURVEY_BLOCK))
    block = group // SURVEY_BLOCK
    start = _int_sum(size_sums, 0, block, SURVEY_BLOCK) + _int_sum(sizes, block * SURVEY_BLOCK, group, SURVEY_BLOCK)
    stop = tl.minimum(start + tl.load(sizes + group), num_rewards)  # sizes on the device are not checked
    lanes = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.float32)
    count, lowest, highest = zero, zero + INF, zero - INF
    for first in range(start, stop, BLOCK):
        r, finite = _load_rewards(rewards, first + lanes, first + lanes < stop)
        count += finite.to(tl.float32)
        lowest = tl.minimum(lowest, tl.where(finite, r, INF))
        highest = tl.maximum(highest, tl.where(finite, r, -INF))
    num_finite = tl.sum(count, axis=0)
    flat = (num_finite < 2.0) | (tl.min(lowest, axis=0) == tl.max(highest, axis=0))
    tl.store(degenerate + group, flat)
    if flat:
        for first in range(start, stop, BLOCK):
            tl.store(values + first + lanes, zero, mask=first + lanes < stop)
    else:
        pivot = tl.min(lowest, axis=0)
        s, s_low, q, q_low = zero, zero, zero, zero
        for first in range(start, stop, BLOCK):
            r, finite = _load_rewards(rewards, first + lanes, first + lanes < stop)
            d, d_low = _centred(r, finite, pivot)
            s, s_low, q, q_low = _accumulate(d, d_low, s, s_low, q, q_low)
        s, s_low = tl.reduce((s, s_low), 0, _add)
        q, q_low = tl.reduce((q, q_low), 0, _add)
        mean, mean_low = _quotient(s, s_low, num_finite, 0.0)
        if STD == "batch":
            scale, scale_low = _batch_deviation(moments, num_blocks, ddof, BLOCK)
        elif STD == "group":
            scale, scale_low = _deviation(num_finite, s, s_low, q, q_low, ddof)
        if STD != "none":
            scale, scale_low = _add(scale, scale_low, eps, 0.0)
        for first in range(start, stop, BLOCK):
            r, finite = _load_rewards(rewards, first + lanes, first + lanes < stop)
            d, d_low = _centred(r, finite, pivot)
            d, d_low = _add(d, d_low, -mean, -mean_low)
            if STD != "none":
                d, d_low = _quotient(d, d_low, scale, scale_low)
            tl.store(values + first + lanes, tl.where(finite, d + d_low, 0.0), mask=first + lanes < stop)


def group_advantage_triton(rewards: Tensor, sizes: Tensor, eps: float, std: str, ddof: int) -> Advantage:
    return Advantage(*_group_advantage(rewards, sizes, float(eps), std, ddof))


@torch.library.custom_op("aot_fast::group_advantage", mutates_args=())
def _group_advantage(rewards: Tensor, sizes: Tensor, eps: float, std: str, ddof: int) -> tuple[Tensor, Tensor, Tensor]:
    num_rewards, num_groups = len(rewards), len(sizes)
    outputs = empty_advantage(rewards, sizes, eps, std, ddof)
    if not num_groups:
        return tuple(t.zero_() for t in outputs)
    rewards, sizes = rewards.contiguous(), sizes.contiguous()
    block, num_warps = SURVEY
    num_blocks = triton.cdiv(max(num_rewards, num_groups), block)
    size_sums = sizes.new_empty(num_blocks)
    nonfinite = sizes.new_empty(num_blocks, dtype=torch.int32)
    moments = rewards.new_empty(NUM_MOMENTS, num_blocks) if std == "batch" else None
    _survey_kernel[(num_blocks,)](
        rewards,
        sizes,
        size_sums,
        nonfinite,
        moments,
        num_rewards,
        num_groups,
        num_blocks,
        BATCH=std == "batch",
        BLOCK=block,
        num_warps=num_warps,
    )
    lanes, num_warps = GROUP
    _group_kernel[(num_groups,)](
        rewards,
        sizes,
        size_sums,
        nonfinite,
        moments,
        *outputs,
        num_rewards,
        num_blocks,
        eps,
        float(ddof),
        STD=std,
        BLOCK=lanes,
        SURVEY_BLOCK=block,
        num_warps=num_warps,
    )
    return outputs


_group_advantage.register_fake(empty_advantage)


def builds() -> list[Build]:
    """What ships, for the gates."""
    pointers = {"rewards": "*fp32", "sizes": "*i64", "size_sums": "*i64", "nonfinite": "*i32"}
    counts = {"num_rewards": "i32", "num_blocks": "i32"}
    outputs = {"values": "*fp32", "degenerate": "*i1", "num_nonfinite": "*i64", "eps": "fp32", "ddof": "fp32"}
    made = []
    for std in ("group", "batch", "none"):
        batch = std == "batch"
        arguments = pointers | counts | ({"moments": "*fp32"} if batch else {})
        absent = {} if batch else {"moments": None}
        if std != "none":
            constants = {"BATCH": batch, "BLOCK": SURVEY[0], **absent}
            kinds, even = arguments | {"num_groups": "i32"}, frozenset({"num_rewards", "num_groups"})
            made.append(Build(f"group_advantage survey {std}", _survey_kernel, kinds, constants, SURVEY[1], divisible=even))
        constants = {"STD": std, "BLOCK": GROUP[0], "SURVEY_BLOCK": SURVEY[0], **absent}
        kinds = arguments | outputs
        # A group may start anywhere: its loads cannot be wide.
        made.append(Build(f"group_advantage {std}", _group_kernel, kinds, constants, GROUP[1], wide_loads=False))
    return made
