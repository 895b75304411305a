"""logprob in Triton: one program a row, the equations of logprob.py.

Forward, a tile of columns at a time, in powers of two (e = 2^(z log2 e)): with the running maximum m, S = sum e^(z - m) and
W = sum e^(z - m) (z - m), a tile with maximum m' > m rescales a = e^(m - m'): W <- a (W + (m - m') S), S <- a S. One exponential an
element: at 152,064 columns of bf16 two would take as long as reading them. Backward: e^(z - m - ln S) once more.

Bytes: forward reads N V logits; backward reads N V and writes N V. Rows without upstream gradient are written and not read.
A row's result depends on V alone (tiles in order, one program), so it has the same bits alone, in a batch or permuted.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import Build
from .logprob import LogProb, RowStats, differentiable_logprob
from .logprob_operators import empty_stats, fake_in_place, fake_logit_gradient

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))

FORWARD = {"small": (1024, 4), "large": (8192, 8)}
"""Columns a tile and warps: 32 elements a thread keep enough bytes in flight; up to 4,096 columns a small tile wastes less of the last."""
BACKWARD = {"small": (1024, 4), "large": (4096, 8)}
LARGE_COLUMNS = 4096


@triton.jit
def expm1(x):
    """e^x - 1 for x <= 0: by its series near 0, where the difference would cancel. Error under 1e-7 relative."""
    s = 1.0 + x / 9.0
    for k in tl.static_range(8, 1, -1):
        s = 1.0 + x * s / k
    return tl.where(x > -0.5, x * s, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def _forward_kernel(
    logits,
    targets,
    logp,
    entropy,
    valid,
    highest,
    log_sum,
    num_columns,
    row_stride,
    column_stride,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    lanes = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    m = -INF
    s = 0.0
    w = 0.0
    for start in range(0, num_columns, BLOCK):
        columns = start + lanes
        inside = columns < num_columns
        z = tl.load(base + columns.to(tl.int64) * column_stride, mask=inside, other=-INF, eviction_policy="evict_first").to(tl.float32)
        m_new = tl.maximum(m, tl.max(z, axis=0))
        pivot = tl.where(m_new == -INF, 0.0, m_new)  # -inf - -inf is NaN
        # Subtracted before it is multiplied: logits of 120 divided by 0.7 first are off by 1e-5.
        d = (z - pivot) * inverse_temperature
        e = tl.exp2(d * LOG2E)
        shift = tl.where(m == -INF, 0.0, (m - pivot) * inverse_temperature)
        a = tl.where(m == -INF, 0.0, tl.exp2(shift * LOG2E))
        w = a * (w + shift * s) + tl.sum(e * tl.maximum(d, -1000.0), axis=0)  # 0 * -inf is NaN
        s = a * s + tl.sum(e, axis=0)
        m = m_new
    in_range = (target >= 0) & (target < num_columns)
    z_t = tl.load(base + tl.where(in_range, target, 0).to(tl.int64) * column_stride).to(tl.float32)
    good = in_range & (z_t != -INF)
    pivot = tl.where(m == -INF, 0.0, m)
    ln_s = tl.log2(s) * LN2
    tl.store(logp + row, tl.where(good, (z_t - pivot) * inverse_temperature - ln_s, 0.0))
    tl.store(entropy + row, tl.where(good, ln_s - w / s, 0.0))
    tl.store(valid + row, good)
    tl.store(highest + row, pivot)
    tl.store(log_sum + row, ln_s)


@triton.jit
def _gradient(z, columns, target, logp, entropy, highest, log_sum, up, bonus, inverse_temperature, WITH_ENTROPY: tl.constexpr):
    """dL/dlogits of a tile, fp32."""
    log_p = (z - highest) * inverse_temperature - log_sum
    p = tl.exp2(log_p * LOG2E)
    # 1 - p of the target as -expm1(log p): p rounded before the subtraction loses the whole gradient of a likely token.
    d = tl.where(columns == target, -up * expm1(logp), -up * p)
    if WITH_ENTROPY:
        d -= bonus * p * (tl.maximum(log_p, -1000.0) + entropy)
    return d * inverse_temperature


@triton.jit
def _backward_kernel(
    logits,
    targets,
    gradient,
    logp,
    entropy,
    valid,
    highest,
    log_sum,
    dlogp,
    dentropy,
    num_columns,
    row_stride,
    column_stride,
    dlogp_stride,
    dentropy_stride,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    out = gradient + row * num_columns + columns
    good = tl.load(valid + row) != 0
    up = tl.where(good, tl.load(dlogp + row * dlogp_stride).to(tl.float32), 0.0) if dlogp is not None else 0.0
    bonus = tl.where(good, tl.load(dentropy + row * dentropy_stride).to(tl.float32), 0.0) if dentropy is not None else 0.0
    if (up == 0.0) & (bonus == 0.0):  # such a row may be NaN, and 0 times NaN is not 0
        tl.store(out, tl.zeros([BLOCK], tl.float32).to(gradient.dtype.element_ty), mask=inside)
    else:
        target = tl.load(targets + row)
        offsets = row * row_stride + columns.to(tl.int64) * column_stride
        z = tl.load(logits + offsets, mask=inside, other=-INF).to(tl.float32)
        lp, h, m, ls = tl.load(logp + row), tl.load(entropy + row), tl.load(highest + row), tl.load(log_sum + row)
        d = _gradient(z, columns, target, lp, h, m, ls, up, bonus, inverse_temperature, dentropy is not None)
        tl.store(out, d.to(gradient.dtype.element_ty), mask=inside)


@triton.jit
def _in_place_kernel(
    logits,
    gradient,
    targets,
    logp,
    entropy,
    valid,
    highest,
    log_sum,
    dlogp,
    dentropy,
    num_columns,
    row_stride,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """The gradient of a row into the first half of the row's own bytes: gradient is logits seen as a half type."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    good = tl.load(valid + row) != 0
    up = tl.where(good, tl.load(dlogp + row), 0.0)
    bonus = tl.where(good, tl.load(dentropy + row), 0.0) if dentropy is not None else 0.0
    dead = (up == 0.0) & (bonus == 0.0)
    lp, h, m, ls = tl.load(logp + row), tl.load(entropy + row), tl.load(highest + row), tl.load(log_sum + row)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_columns
        z = tl.load(logits + row * row_stride + columns, mask=inside & (not dead), other=-INF)
        d = _gradient(z, columns, target, lp, h, m, ls, up, bonus, inverse_temperature, dentropy is not None)
        d = tl.where(dead, 0.0, d)
        # A tile's gradient lies where earlier tiles' logits were: no warp may write before all have read.
        tl.debug_barrier()
        tl.store(gradient + row * 2 * row_stride + columns, d.to(gradient.dtype.element_ty), mask=inside)


def _size(num_columns: int) -> str:
    return "large" if num_columns > LARGE_COLUMNS else "small"


def row_stats(logits: Tensor, targets: Tensor, temperature: float) -> RowStats:
    """As logprob.row_stats, in one pass over the logits."""
    return RowStats(*_row_stats(logits, targets, temperature))


@torch.library.custom_op("aot_fast::row_stats", mutates_args=())
def _row_stats(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_columns = logits.shape
    stats = empty_stats(logits, targets, temperature)
    if num_rows and not num_columns:
        return tuple(field.zero_() for field in stats)
    if num_rows:
        block, num_warps = FORWARD[_size(num_columns)]
        _forward_kernel[(num_rows,)](
            logits, targets.contiguous(), *stats, num_columns, *logits.stride(), 1 / temperature, BLOCK=block, num_warps=num_warps
        )
    return stats


_row_stats.register_fake(empty_stats)


def logit_gradient(
    logits: Tensor, targets: Tensor, stats: RowStats, dlogp: Tensor | None, dentropy: Tensor | None, temperature: float, dtype: torch.dtype
) -> Tensor:
    """As logprob.logit_gradient."""
    return _logit_gradient(logits, targets, *stats, dlogp, dentropy, temperature, dtype)


@torch.library.custom_op("aot_fast::logit_gradient", mutates_args=())
def _logit_gradient(
    logits: Tensor,
    targets: Tensor,
    logp: Tensor,
    entropy: Tensor,
    valid: Tensor,
    highest: Tensor,
    log_sum: Tensor,
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> Tensor:
    num_rows, num_columns = logits.shape
    gradient = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    if gradient.numel():
        block, num_warps = BACKWARD[_size(num_columns)]
        strides = [0 if up is None else up.stride(0) for up in (dlogp, dentropy)]
        fields = logp, entropy, valid, highest, log_sum
        _backward_kernel[(num_rows, triton.cdiv(num_columns, block))](
            logits,
            targets.contiguous(),
            gradient,
            *fields,
            dlogp,
            dentropy,
            num_columns,
            *logits.stride(),
            *strides,
            1 / temperature,
            BLOCK=block,
            num_warps=num_warps,
        )
    return gradient


_logit_gradient.register_fake(fake_logit_gradient)


def consumed_gradient(
    logits: Tensor, targets: Tensor, stats: RowStats, dlogp: Tensor, dentropy: Tensor | None, temperature: float, dtype: torch.dtype
) -> Tensor:
    """As logit_gradient, in the memory of the logits where they are fp32 rows and `dtype` a half type; the logits are gone afterwards."""
    if logits.dtype != torch.float32 or dtype.itemsize != 2 or not logits.is_contiguous():
        return logit_gradient(logits, targets, stats, dlogp, dentropy, temperature, dtype)
    ups = [None if up is None else up.float().contiguous() for up in (dlogp, dentropy)]
    _gradient_in_place(logits, targets, *stats, *ups, temperature, dtype)
    return logits.view(dtype)[:, : logits.shape[1]]


@torch.library.custom_op("aot_fast::logit_gradient_in_place", mutates_args=("logits",))
def _gradient_in_place(
    logits: Tensor,
    targets: Tensor,
    logp: Tensor,
    entropy: Tensor,
    valid: Tensor,
    highest: Tensor,
    log_sum: Tensor,
    dlogp: Tensor,
    dentropy: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> None:
    num_rows, num_columns = logits.shape
    if logits.numel():
        block, num_warps = BACKWARD[_size(num_columns)]
        _in_place_kernel[(num_rows,)](
            logits,
            logits.view(dtype),
            targets.contiguous(),
            logp,
            entropy,
            valid,
            highest,
            log_sum,
            dlogp,
            dentropy,
            num_columns,
            num_columns,
            1 / temperature,
            BLOCK=block,
            num_warps=num_warps,
        )


_gradient_in_place.register_fake(fake_in_place)


def logprob_triton(logits: Tensor, targets: Tensor, temperature: float) -> LogProb:
    return differentiable_logprob(logits, targets, temperature, row_stats, logit_gradient)


def builds() -> list[Build]:
    """What ships, for the gates."""
    rows = dict.fromkeys(("logp", "entropy", "highest", "log_sum"), "*fp32") | {"valid": "*i1", "targets": "*i64"}
    common = rows | {"num_columns": "i32", "row_stride": "i64", "inverse_temperature": "fp32"}
    divisible = frozenset({"num_columns", "row_stride"})

    def backward(name: str, kernel, size: str, arguments: dict[str, str], constants: dict[str, int], entropy: bool) -> Build:
        block, warps = BACKWARD[size]
        bonus = {"dentropy": "*fp32"} if entropy else {}
        constants = constants | {"BLOCK": block} | ({} if entropy else {"dentropy": None})
        label = f"{name}{' entropy' if entropy else ''} {size}"
        return Build(label, kernel, common | arguments | bonus, constants, warps, divisible=divisible)

    made = []
    for size in ("small", "large"):
        block, warps = FORWARD[size]
        for dtype in ("bf16", "fp32"):
            arguments = common | {"logits": f"*{dtype}"}
            constants = {"BLOCK": block, "column_stride": 1}
            made.append(Build(f"logprob forward {dtype} {size}", _forward_kernel, arguments, constants, warps, divisible=divisible))
            for entropy in (False, True):
                arguments = {"logits": f"*{dtype}", "gradient": f"*{dtype}", "dlogp": "*fp32"}
                strides = {"column_stride": 1, "dlogp_stride": 1, "dentropy_stride": 1}
                made.append(backward(f"logprob backward {dtype}", _backward_kernel, size, arguments, strides, entropy))
        for entropy in (False, True):
            arguments = {"logits": "*fp32", "gradient": "*bf16", "dlogp": "*fp32"}
            made.append(backward("logit gradient in place", _in_place_kernel, size, arguments, {}, entropy))
    return made
