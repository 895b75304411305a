"""flow_policy_loss in Triton: one program for all samples, the equations of flow_policy_loss.py.

B is the samples of a micro-batch, a few thousand at most, so that a launch costs more than the work: 2 launches with the copy that attaches
the gradients. One pass forms the loss, its gradients and the metrics. Everything is taken from e^d - 1, how far a ratio is from 1, by its
series near 0: a clip range of 2e-6 is 17 units in the last place of a ratio, and an exponential is off by two.
"""

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .ahead_of_time import Build
from .flow_operators import empty_flow_loss, fake_flow_loss, flow_policy_loss_by
from .metrics import PolicyLoss
from .ratio_triton import LIMIT, clamp, exp_minus

SAMPLES = (512, 8)
"""Samples a step, and warps: two a thread, which keeps 17 numbers of each; four spill."""


@triton.jit
def _load(values, index, stride, given):
    """Values under the mask, 0 for the others, which may be NaN."""
    return tl.load(values + index * stride, mask=given, other=0.0).to(tl.float32)


@triton.jit
def _surrogate(log_ratio, advantage, divergence, clip, tau, VARIANT: tl.constexpr):
    """l + A, dl/dlog_ratio, r - 1 and what dppo drops. -A r is compared with its clipped form by what they differ in."""
    deviation, _ = exp_minus(clamp(log_ratio, -LIMIT, LIMIT))
    loss = -advantage * deviation
    slope = tl.where((log_ratio < -LIMIT) | (log_ratio > LIMIT), 0.0, -advantage * (1.0 + deviation))
    dropped = loss != loss
    if VARIANT == "dppo":
        away = ((advantage > 0.0) & (deviation > 0.0)) | ((advantage < 0.0) & (deviation < 0.0))
        dropped = away & (divergence >= tau)
        loss, slope = tl.where(dropped, advantage, loss), tl.where(dropped, 0.0, slope)
    else:
        clipped = -advantage * clamp(deviation, -clip, clip)
        loss, slope = tl.where(loss < clipped, clipped, loss), tl.where(loss < clipped, 0.0, slope)
    return loss, slope, deviation, dropped


@triton.jit
def _stack(a, b, c, d, e, f, g, h):
    """[BLOCK, 2, 2, 2], in order when flattened: one reduction then adds up all eight."""
    even, odd = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
    return tl.join(even, odd)


@triton.jit
def _normaliser(number, fixed, mask, num_samples, BLOCK: tl.constexpr):
    if number is not None:
        count = tl.load(number).to(tl.float32)
    elif fixed is not None:
        count = fixed
    else:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, num_samples, BLOCK):
            index = start + tl.arange(0, BLOCK)
            given = index < num_samples
            if mask is not None:
                given &= tl.load(mask + index, mask=given, other=0) != 0
            total += given.to(tl.float32)
        count = tl.maximum(tl.sum(total, axis=0), 1.0)
    return 1.0 / count


@triton.jit
def _loss_kernel(
    logp,
    old,
    advantages,
    kl,
    drift,
    std,
    dt,
    mask,
    number,
    results,
    dlogp,
    dkl,
    ddrift,
    num_samples,
    std_stride,
    dt_stride,
    fixed,
    clip,
    beta,
    tau,
    adv_clip,
    VARIANT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    weight = _normaliser(number, fixed, mask, num_samples, BLOCK)
    counts, sums = tl.zeros([BLOCK, 2, 2, 2], tl.float32), tl.zeros([BLOCK, 2, 2, 2], tl.float32)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_samples, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < num_samples
        given = inside
        if mask is not None:
            given = inside & (tl.load(mask + index, mask=inside, other=0) != 0)
        d = _load(logp, index, 1, given) - _load(old, index, 1, given)
        wanted = _load(advantages, index, 1, given)
        advantage = clamp(wanted, -adv_clip, adv_clip)
        change = _load(drift, index, 1, given) if drift is not None else tl.zeros_like(d)
        s, divergence, stochastic = tl.zeros_like(d) + 1.0, tl.zeros_like(d), given
        if VARIANT != "grpo":
            s = _load(std, index, std_stride, given)
            stochastic = s > 0.0
            s = tl.where(stochastic, s, 1.0)
            divergence = tl.where(stochastic, 0.5 * change / s / s, 0.0)
        log_ratio = (d + divergence) * s if VARIANT == "guard" else d
        loss, slope, deviation, dropped = _surrogate(log_ratio, advantage, divergence, clip, tau, VARIANT)
        loss -= advantage
        if VARIANT == "guard":
            per_time = 1.0 / tl.where(given, -_load(dt, index, dt_stride, given), 1.0)
            loss *= per_time
            tl.store(ddrift + index, tl.where(stochastic, slope * per_time * weight * 0.5 / s, 0.0), mask=inside)
            slope *= per_time * s
        to_ref = _load(kl, index, 1, given) if kl is not None else tl.zeros_like(d)
        if beta is not None:
            loss += beta * to_ref
            tl.store(dkl + index, tl.where(given, beta * weight, 0.0), mask=inside)
        slope = tl.where(given, slope * weight, 0.0)
        tl.store(dlogp + index, slope, mask=inside)

        d = clamp(d, -LIMIT, LIMIT)
        _, k3 = exp_minus(d)
        on = given.to(tl.float32)
        clipped, low = (wanted != advantage).to(tl.float32), ((advantage < 0.0) & (deviation < -clip)).to(tl.float32)
        high, zero = ((advantage > 0.0) & (deviation > clip)).to(tl.float32), (given & (slope == 0.0)).to(tl.float32)
        counts += _stack(loss * weight, on, inside.to(tl.float32) - on, clipped, low, high, dropped.to(tl.float32), zero)
        sums += _stack(on + deviation, -d, k3, advantage, advantage * advantage, to_ref, change, d)
        size = tl.abs(deviation)
        largest = tl.where((size > largest) | (size != size), size, largest)
    lanes = tl.arange(0, 8)
    tl.store(results + lanes, tl.reshape(tl.sum(counts, axis=0), [8]))
    tl.store(results + 8 + lanes, tl.reshape(tl.sum(sums, axis=0), [8]))
    total = tl.sum(largest, axis=0)
    tl.store(results + 16, tl.where(total != total, total, tl.max(largest, axis=0)))  # tl.max passes over NaN


@torch.library.custom_op("aot_fast::flow_policy_loss", mutates_args=())
def _flow_policy_loss(
    logp: Tensor,
    old: Tensor,
    advantages: Tensor,
    kl: Tensor | None,
    drift: Tensor | None,
    std: Tensor | None,
    dt: Tensor | None,
    mask: Tensor | None,
    number: Tensor | None,
    fixed: float | None,
    clip: float,
    beta: float | None,
    tau: float,
    adv_clip: float,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RESULTS; dL/dlogp, dL/dkl and dL/ddrift, empty where there is none."""
    outputs = empty_flow_loss(logp, beta is not None, variant)
    results, dlogp, dkl, ddrift = outputs
    _loss_kernel[(1,)](
        *(logp, old, advantages, kl, drift, std, dt, mask, number, results, dlogp),
        *(None if beta is None else dkl, ddrift if variant == "guard" else None, len(logp)),
        *(0 if t is None else t.stride(0) for t in (std, dt)),
        *(fixed, clip, beta, tau, adv_clip),
        VARIANT=variant,
        BLOCK=SAMPLES[0],
        num_warps=SAMPLES[1],
        num_stages=1,
    )
    return outputs


_flow_policy_loss.register_fake(fake_flow_loss)


def flow_policy_loss_triton(*arguments) -> PolicyLoss:
    """As flow_policy_loss_reference."""
    return flow_policy_loss_by("aot_fast", *arguments)


def builds() -> list[Build]:
    """What ships, for the gates."""
    made = []
    numbers = dict.fromkeys(("clip", "beta", "tau", "adv_clip"), "fp32") | {"num_samples": "i32", "std_stride": "i32", "dt_stride": "i32"}
    for dtype, variant in itertools.product(("bf16", "fp32"), ("grpo", "guard", "dppo")):
        pointers = dict.fromkeys(("results", "dlogp", "dkl", "ddrift", "std", "dt", "number"), "*fp32") | {"mask": "*i1"}
        pointers |= dict.fromkeys(("logp", "old", "advantages", "kl", "drift"), f"*{dtype}")
        for name, absent in (("", {"fixed"}), (" least", {"fixed", "number", "mask", "kl", "dkl", "beta"})):
            absent = absent | ({"ddrift", "dt"} if variant != "guard" else set()) | ({"drift", "std"} if variant == "grpo" else set())
            arguments = {k: kind for k, kind in (pointers | numbers).items() if k not in absent}
            constants = {"VARIANT": variant, "BLOCK": SAMPLES[0]} | dict.fromkeys(absent)
            made.append(
                Build(f"flow_policy_loss {variant}{name} {dtype}", _loss_kernel, arguments, constants, SAMPLES[1], wide_loads=False)
            )
    return made
