"""The Triton kernels of flow_step_triton.py: the equations of flow_step.py.

forward_kernel takes a step and scores it, or scores a stored one: one code for both. A program goes over a strip of tiles of a sample and
leaves a sum of squares of every SEGMENT lanes; finish_kernel adds those of a sample in order. backward_kernel, a tile a program, reads what
the forward pass read and writes the gradients.
"""

import triton
import triton.language as tl

from .guidance_triton import guided, guided_gradient, pairwise_sum, read, tile_offsets
from .philox_triton import consecutive_normals, element_normals

LN2 = tl.constexpr(0.6931471805599453)
HALF_LN_2PI = tl.constexpr(0.9189385332046727)


@triton.jit
def as_fp32(coefficients, sample):
    """An fp64 number as fp32, to nearest, from its bits: a conversion would be a launch of its own, or fp64 in here."""
    bits = tl.load(coefficients + sample)
    magnitude = bits & 0x7FFFFFFFFFFFFFFF
    word = ((magnitude + 0xFFFFFFF + ((magnitude >> 29) & 1)) >> 29) - (896 << 23)
    word = tl.where(word < (1 << 23), 0, tl.minimum(word, 0x7F800000))
    word = tl.where(magnitude > 0x7FF0000000000000, 0x7FC00000, word)
    value = word.to(tl.int32).to(tl.float32, bitcast=True)
    return tl.where(bits < 0, -value, value)


@triton.jit
def _mean(x, velocity, a, b):
    return tl.fma(b, velocity, a * x)


@triton.jit
def _add_square(total, difference, inside):
    d = tl.where(inside, difference, 0.0)
    return tl.fma(d, d, total)


@triton.jit
def _store_sums(sums, total, SIZE: tl.constexpr, SEGMENT: tl.constexpr):
    tl.store(sums + tl.arange(0, SIZE // SEGMENT), pairwise_sum(total, SIZE, SIZE // SEGMENT))


@triton.jit
def forward_kernel(
    x,
    v,
    v_uncond,
    x_next,
    noise,
    seeds,
    v_ref,
    v_old,
    a,
    b,
    std,
    partial,
    n,
    num_tiles,
    num_strips,
    kind_stride,
    x_stride,
    v_stride,
    uncond_stride,
    next_stride,
    noise_stride,
    ref_stride,
    old_stride,
    guidance,
    ROLLOUT: tl.constexpr,
    RESCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAD: tl.constexpr,
    STRIP: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    SIZE: tl.constexpr = TOKENS * PAD
    sample = (tl.program_id(0) // num_strips).to(tl.int64)
    strip = tl.program_id(0) % num_strips
    scale, slope, s = as_fp32(a, sample), as_fp32(b, sample), as_fp32(std, sample)
    if seeds is not None:
        seed = tl.load(seeds + sample)
    residual = tl.zeros([SIZE], tl.float32)
    from_ref = tl.zeros([SIZE], tl.float32)
    from_old = tl.zeros([SIZE], tl.float32)
    for tile in range(strip * STRIP, tl.minimum((strip + 1) * STRIP, num_tiles)):
        offset, inside = tile_offsets(tile, n, TOKENS, CHANNELS, PAD)
        velocity = read(v + sample * v_stride, offset, inside)
        if v_uncond is not None:
            velocity = guided(velocity, read(v_uncond + sample * uncond_stride, offset, inside), guidance, RESCALE, TOKENS, PAD)
        mean = _mean(read(x + sample * x_stride, offset, inside), velocity, scale, slope)
        if ROLLOUT:
            following = mean
            if noise is not None:
                z = read(noise + sample * noise_stride, offset, inside)
                following = tl.where(s > 0.0, tl.fma(s, z, mean), mean)
            elif seeds is not None:
                if CHANNELS == PAD:
                    z = consecutive_normals(seed, tile * SIZE, SIZE, 2 if x_next.dtype.element_ty.primitive_bitwidth == 16 else 1)
                else:
                    z = element_normals(seed, offset)
                following = tl.fma(s, z, mean)  # z is finite: S = 0 adds nothing
            stored = following.to(x_next.dtype.element_ty)
            tl.store(x_next + sample * next_stride + offset, stored, mask=inside)
            scored = stored.to(tl.float32)
        else:
            scored = read(x_next + sample * next_stride, offset, inside)
        residual = _add_square(residual, scored - mean, inside)
        if v_ref is not None:
            from_ref = _add_square(from_ref, velocity - read(v_ref + sample * ref_stride, offset, inside), inside)
        if v_old is not None:
            from_old = _add_square(from_old, velocity - read(v_old + sample * old_stride, offset, inside), inside)
    sums = partial + (sample * num_strips + strip) * (SIZE // SEGMENT)
    _store_sums(sums, residual, SIZE, SEGMENT)
    if v_ref is not None:
        sums += kind_stride
        _store_sums(sums, from_ref, SIZE, SEGMENT)
    if v_old is not None:
        sums += kind_stride
        _store_sums(sums, from_old, SIZE, SEGMENT)


@triton.jit
def _mean_square(sums, num_sums, n, LANES: tl.constexpr):
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, num_sums, LANES):
        index = start + tl.arange(0, LANES)
        total += tl.load(sums + index, mask=index < num_sums, other=0.0)
    return tl.sum(pairwise_sum(total, LANES, 1), axis=0) / n


@triton.jit
def finish_kernel(
    partial,
    b,
    std,
    diffusion,
    logp,
    kl,
    drift,
    num_sums,
    kind_stride,
    n,
    PUBLISHED: tl.constexpr,
    FLOW_GRPO_KL: tl.constexpr,
    LANES: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    sums = partial + sample * num_sums
    s, slope = as_fp32(std, sample), as_fp32(b, sample)
    stochastic = s > 0.0
    s = tl.where(stochastic, s, 1.0)
    score = -_mean_square(sums, num_sums, n, LANES)
    if not PUBLISHED:
        # Divided by S twice: S^2 leaves the range of fp32 before S does.
        score = tl.fma(tl.log2(s), -LN2, 0.5 * score / s / s) - HALF_LN_2PI
    tl.store(logp + sample, tl.where(stochastic, score, 0.0))
    if kl is not None:
        sums += kind_stride
        width = tl.where(stochastic, as_fp32(diffusion, sample), 1.0) if FLOW_GRPO_KL else s
        value = 0.5 * _mean_square(sums, num_sums, n, LANES) * (slope / width) * (slope / width)
        tl.store(kl + sample, tl.where(stochastic, value, 0.0))
    if drift is not None:
        sums += kind_stride
        tl.store(drift + sample, slope * slope * _mean_square(sums, num_sums, n, LANES))


@triton.jit
def _upstream(gradient, sample, stride, n):
    return tl.load(gradient + sample * stride).to(tl.float32) / n


@triton.jit
def _add(g, coefficient, difference):
    """g + coefficient difference, where a coefficient of 0 adds nothing whatever the difference is."""
    return tl.where(coefficient != 0.0, tl.fma(coefficient, difference, g), g)


@triton.jit
def backward_kernel(
    x,
    v,
    v_uncond,
    x_next,
    v_ref,
    v_old,
    a,
    b,
    std,
    diffusion,
    dlogp,
    dkl,
    ddrift,
    dv,
    dv_uncond,
    n,
    num_tiles,
    x_stride,
    v_stride,
    uncond_stride,
    next_stride,
    ref_stride,
    old_stride,
    dlogp_stride,
    dkl_stride,
    ddrift_stride,
    guidance,
    PUBLISHED: tl.constexpr,
    FLOW_GRPO_KL: tl.constexpr,
    RESCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAD: tl.constexpr,
):
    sample = (tl.program_id(0) // num_tiles).to(tl.int64)
    offset, inside = tile_offsets(tl.program_id(0) % num_tiles, n, TOKENS, CHANNELS, PAD)
    conditional = read(v + sample * v_stride, offset, inside)
    velocity = conditional
    if v_uncond is not None:
        unconditional = read(v_uncond + sample * uncond_stride, offset, inside)
        velocity = guided(conditional, unconditional, guidance, RESCALE, TOKENS, PAD)
    s, slope = as_fp32(std, sample), as_fp32(b, sample)
    stochastic = s > 0.0
    s = tl.where(stochastic, s, 1.0)
    g = tl.zeros_like(velocity)
    live = s != s
    if dlogp is not None:
        c = _upstream(dlogp, sample, dlogp_stride, n) * (2.0 * slope if PUBLISHED else slope / s / s)
        c = tl.where(stochastic, c, 0.0)
        mean = _mean(read(x + sample * x_stride, offset, inside), velocity, as_fp32(a, sample), slope)
        g = _add(g, c, read(x_next + sample * next_stride, offset, inside) - mean)
        live |= c != 0.0
    if dkl is not None:
        width = tl.where(stochastic, as_fp32(diffusion, sample), 1.0) if FLOW_GRPO_KL else s
        c = _upstream(dkl, sample, dkl_stride, n) * (slope / width) * (slope / width)
        c = tl.where(stochastic, c, 0.0)
        g = _add(g, c, velocity - read(v_ref + sample * ref_stride, offset, inside))
        live |= c != 0.0
    if ddrift is not None:
        c = _upstream(ddrift, sample, ddrift_stride, n) * (2.0 * slope * slope)
        g = _add(g, c, velocity - read(v_old + sample * old_stride, offset, inside))
        live |= c != 0.0
    if v_uncond is not None:
        g, g_uncond = guided_gradient(g, conditional, unconditional, guidance, RESCALE, TOKENS, PAD)
        # Where nothing is asked, the norms may still be NaN.
        g = tl.where(live, g, 0.0)
        tl.store(dv_uncond + sample * n + offset, tl.where(live, g_uncond, 0.0).to(dv_uncond.dtype.element_ty), mask=inside)
    tl.store(dv + sample * n + offset, g.to(dv.dtype.element_ty), mask=inside)
