"""The kernels of policy_loss in Triton: what policy_loss_triton.py launches, with the equations of policy_loss.py."""

import triton
import triton.language as tl

from .policy_operators import ROWS
from .ratio_triton import LIMIT, clamp, exp_minus

TOKENS = (128, 1)
"""Tokens a block and warps: 4 a thread, for 128-bit loads of fp32 (8 need 146 registers); one warp reduces without a barrier."""
SEQUENCES = (512, 4)
"""Responses have hundreds to thousands of tokens; at 8 tokens a thread it spills."""
FINISH = (256, 8)
"""Columns of partial sums at a time, those of 32,768 tokens, and warps."""
BACKWARD = (1024, 4)

NUM_ROWS = tl.constexpr(len(ROWS))


@triton.jit
def _live(mask, valid, index, inside):
    """Tokens under the mask, and those of them that are valid."""
    given = inside
    if mask is not None:
        given = inside & (tl.load(mask + index, mask=inside, other=0) != 0)
    live = given
    if valid is not None:
        live = given & (tl.load(valid + index, mask=inside, other=0) != 0)
    return given, live


@triton.jit
def _load(values, index, inside, live):
    """Values of live tokens, 0 for the others: what is masked may be NaN or 300, and 0 times its exponential is not 0."""
    return tl.where(live, tl.load(values + index, mask=inside, other=0).to(tl.float32), 0.0)


@triton.jit
def _surrogate(ratio, advantage, low, high):
    """u = min(r A, clip(r) A) and du/dr. Where both sides are equal each counts half, as in autograd."""
    plain, clipped = ratio * advantage, clamp(ratio, low, high) * advantage
    inside = (ratio >= low) & (ratio <= high)
    slope = tl.where(inside | (plain < clipped), advantage, tl.where(plain == clipped, 0.5 * advantage, 0.0))
    return tl.where(clipped < plain, clipped, plain), slope


@triton.jit
def _dual_clipped(u, slope, advantage, dual_clip):
    """max(u, c A) where A < 0, and du/dr."""
    bound = dual_clip * advantage
    share = tl.where(u > bound, 1.0, tl.where(u == bound, 0.5, 0.0))
    negative = advantage < 0.0
    return tl.where(negative & (u < bound), bound, u), tl.where(negative, slope * share, slope)


@triton.jit
def _kl(q, KL: tl.constexpr):
    """The estimate of KL(new || ref) from q = ref - logp, and its derivative by logp."""
    inside = (q >= -LIMIT) & (q <= LIMIT)
    q = clamp(q, -LIMIT, LIMIT)
    if KL == "k1":
        value, slope = -q, tl.where(inside, 1.0, 0.0)
    elif KL == "k2":
        value, slope = 0.5 * q * q, tl.where(inside, -q, 0.0)
    else:
        one, value = exp_minus(q)
        slope = tl.where(inside, -one, 0.0)
    return value, slope


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _count_sequences(live, index, inside, start, mask, valid, seq_ids, BLOCK: tl.constexpr):
    """How many live tokens of the block are the first live token of their sequence."""
    lanes = tl.arange(0, BLOCK)
    own = tl.load(seq_ids + index, mask=inside, other=0)
    earlier = inside & (index > 0)
    _, alive = _live(mask, valid, index - 1, earlier)
    # The last live token before: lane j stands for token start + j - 1.
    last = tl.associative_scan(tl.where(alive, lanes, -1), 0, _larger)
    found = inside & (last >= 0)
    same = found & (tl.load(seq_ids + start + last - 1, mask=found, other=0) == own)
    count = tl.sum((live & (same == 0)).to(tl.int32), axis=0)
    # Only the block's first live token can have its predecessor in an earlier block: look back as far as its sequence goes.
    pending = live & (last < 0)
    wanted = tl.sum(tl.where(pending, own, 0), axis=0)
    stop = tl.where(tl.sum(pending.to(tl.int32), axis=0) > 0, start, 0)
    while stop > 0:
        back = stop - BLOCK + lanes
        same = (back >= 0) & (tl.load(seq_ids + back, mask=back >= 0, other=0) == wanted)
        _, alive = _live(mask, valid, back, same)
        seen = tl.max((alive & same).to(tl.int32), axis=0)
        count -= seen
        stop = tl.where((seen == 0) & (tl.sum(same.to(tl.int32), axis=0) == BLOCK), stop - BLOCK, 0)
    return count


@triton.jit
def tokens_kernel(
    logp,
    entropy,
    advantages,
    old,
    ref,
    mask,
    valid,
    seq_ids,
    weight,
    sequence_log_ratio,
    sequence_gradient,
    gradient,
    bonus,
    partials,
    num_tokens,
    num_blocks,
    ratio_low,
    ratio_high,
    dual_clip,
    beta,
    entropy_coef,
    LOSS: tl.constexpr,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    start = block.to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    inside = index < num_tokens
    given, live = _live(mask, valid, index, inside)
    out = partials + block
    num_sequences = 0.0
    if seq_ids is not None:
        num_sequences = _count_sequences(live, index, inside, start, mask, valid, seq_ids, BLOCK).to(tl.float32)
    tl.store(out + (NUM_ROWS - 2) * num_blocks, num_sequences)
    x = _load(logp, index, inside, live)
    advantage = _load(advantages, index, inside, live)
    w = live.to(tl.float32) if weight is None else _load(weight, index, inside, live)
    d = x - (x if old is None else _load(old, index, inside, live))
    log_ratio = d if sequence_log_ratio is None else _load(sequence_log_ratio, index, inside, live)
    ratio = tl.exp(clamp(log_ratio, -LIMIT, LIMIT))
    dual = tl.zeros([BLOCK], tl.int1)
    if LOSS == "cispo":
        slope = clamp(ratio, ratio_low, ratio_high) * advantage
        u = slope * x
    else:
        u, slope = _surrogate(ratio, advantage, ratio_low, ratio_high)
        if dual_clip is not None:
            u, slope = _dual_clipped(u, slope, advantage, dual_clip)
            dual = (advantage < 0.0) & (ratio > dual_clip)
        slope = tl.where((log_ratio >= -LIMIT) & (log_ratio <= LIMIT), slope * ratio, 0.0)
    dlogp = -w * slope if sequence_gradient is None else _load(sequence_gradient, index, inside, live)
    kl = tl.zeros_like(x)
    if ref is not None:
        kl, dkl = _kl(_load(ref, index, inside, live) - x, KL)
        if beta is not None:
            u -= beta * kl
            dlogp += w * beta * dkl
    h = tl.zeros_like(x)
    if entropy is not None:
        h = _load(entropy, index, inside, live)
        if entropy_coef is not None:
            u += entropy_coef * h
            tl.store(bonus + index, -entropy_coef * w, mask=inside)
    dlogp = tl.where(live, dlogp, 0.0)
    tl.store(gradient + index, dlogp, mask=inside)

    low, high = (advantage < 0.0) & (ratio < ratio_low), (advantage > 0.0) & (ratio > ratio_high)
    d = clamp(d, -LIMIT, LIMIT)
    _, k3 = exp_minus(d)
    zero, masked, invalid = live & (dlogp == 0.0), inside & (given == 0), given & (live == 0)
    sums = (
        -w * u,
        live,
        tl.where(live, ratio, 0.0),
        low,
        high,
        dual,
        -d,
        k3,
        advantage,
        advantage * advantage,
        zero,
        masked,
        invalid,
        kl,
        h,
    )
    for k in tl.static_range(len(sums)):
        tl.store(out + k * num_blocks, tl.sum(sums[k].to(tl.float32), axis=0))
    tl.store(out + (NUM_ROWS - 1) * num_blocks, tl.max(tl.abs(ratio - 1.0), axis=0))


@triton.jit
def sequences_kernel(
    logp,
    advantages,
    old,
    mask,
    valid,
    seq_ids,
    weight,
    sequence_weight,
    log_ratio,
    gradient,
    num_tokens,
    ratio_low,
    ratio_high,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    own = tl.load(seq_ids + start)
    if (start == 0) | (tl.load(seq_ids + tl.maximum(start - 1, 0)) != own):
        stop, end = start, BLOCK
        while end == BLOCK:
            inside = stop + lanes < num_tokens
            end = tl.min(tl.where(inside & (tl.load(seq_ids + stop + lanes, mask=inside, other=0) == own), BLOCK, lanes), axis=0)
            stop += end
        count, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for first in range(start, stop, BLOCK):
            index = first + lanes
            inside = index < stop
            _, live = _live(mask, valid, index, inside)
            count += live.to(tl.float32)
            if log_ratio is not None:
                x = _load(logp, index, inside, live)
                total += x - (x if old is None else _load(old, index, inside, live))
        zero = tl.zeros([BLOCK], tl.float32)
        length = tl.maximum(tl.sum(count, axis=0), 1.0)
        mean = zero + tl.sum(total, axis=0) / length
        ratio = tl.exp(clamp(mean, -LIMIT, LIMIT))
        total = zero
        if log_ratio is not None:
            for first in range(start, stop, BLOCK):
                index = first + lanes
                inside = index < stop
                _, live = _live(mask, valid, index, inside)
                _, slope = _surrogate(ratio, _load(advantages, index, inside, live), ratio_low, ratio_high)
                total += slope if weight is None else slope * _load(weight, index, inside, live)
        shared = -tl.sum(total, axis=0) * ratio / length
        if sequence_weight is not None:
            shared /= length
        shared = tl.where((mean >= -LIMIT) & (mean <= LIMIT), shared, 0.0)
        for first in range(start, stop, BLOCK):
            inside = first + lanes < stop
            if sequence_weight is not None:
                tl.store(sequence_weight + first + lanes, zero + 1.0 / length, mask=inside)
            if log_ratio is not None:
                tl.store(log_ratio + first + lanes, mean, mask=inside)
                tl.store(gradient + first + lanes, shared, mask=inside)


@triton.jit
def finish_kernel(partials, number, loss, scale, results, num_blocks, fixed, divisor, AGG: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.arange(0, 32)[:, None]
    used = rows < NUM_ROWS
    total = tl.zeros([32, BLOCK], tl.float32)
    for first in range(0, num_blocks, BLOCK):
        columns = first + tl.arange(0, BLOCK)[None, :]
        part = tl.load(partials + rows * num_blocks + columns, mask=used & (columns < num_blocks), other=0.0)
        total = tl.where(rows == NUM_ROWS - 1, tl.maximum(total, part), total + part)
    rows = tl.arange(0, 32)
    total = tl.where(rows == NUM_ROWS - 1, tl.max(total, axis=1), tl.sum(total, axis=1))
    if number is not None:
        count = tl.load(number).to(tl.float32)
    elif fixed is not None:
        count = fixed
    else:
        counted = rows == (1 if AGG == "token" else NUM_ROWS - 2)
        count = tl.maximum(tl.sum(tl.where(counted, total, 0.0), axis=0), 1.0)
    num_live = tl.sum(tl.where(rows == 1, total, 0.0), axis=0)
    factor = tl.where(num_live > 0, 1.0 / (count * divisor), 0.0)  # a global count may be 0 where nothing is left
    tl.store(scale, factor)
    tl.store(loss, factor * tl.sum(tl.where(rows == 0, total, 0.0), axis=0))
    tl.store(results + rows, total, mask=rows < NUM_ROWS)


@triton.jit
def backward_kernel(gradient, bonus, scale, upstream, dlogp, dentropy, num_tokens, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_tokens
    factor = tl.load(scale) * tl.load(upstream).to(tl.float32)
    tl.store(dlogp + index, (tl.load(gradient + index, mask=inside) * factor).to(dlogp.dtype.element_ty), mask=inside)
    if dentropy is not None:
        tl.store(dentropy + index, (tl.load(bonus + index, mask=inside) * factor).to(dentropy.dtype.element_ty), mask=inside)
