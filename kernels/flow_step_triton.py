"""flow_step and flow_logp in Triton: the equations of flow_step.py, the kernels of flow_kernels_triton.py.

Bytes an element in bf16: flow_step reads x, v and writes x_next, 6 (v_uncond or noise 2 more each); flow_logp reads x, v, x_next, 6
(v_uncond, v_ref, v_old 2 more each) in each direction and writes dv (dv_uncond), 2 each. The partial sums are 0.03 of a byte.
Launches: flow_step 2, its backward 1; flow_logp 2 forward, 1 backward. Given the same v, a replay has the bits of the rollout; what that
takes is in guidance_triton.py.
"""

import itertools
from typing import Any

import torch
import triton
from torch import Tensor

from .ahead_of_time import Build
from .flow_kernels_triton import backward_kernel, finish_kernel, forward_kernel
from .flow_operators import empty_gradients, empty_scores, fake_logp, fake_logp_gradient, fake_step, flow_logp_by, flow_step_by
from .flow_step import FlowLogProb, FlowStep
from .guidance_triton import guided_velocity_triton, num_warps, tiling

__all__ = ["flow_logp_triton", "flow_step_triton", "guided_velocity_triton"]

STRIP = 8
"""Tiles a program of the forward kernel. Its coefficients and sums are 200 instructions a thread, a tile 140 (scored) to 410 (drawn)."""
SEGMENT = 32
"""Lanes a partial sum: those of four or eight threads, so that two or three shuffles make it."""
FINISH = (512, 4)
"""Partial sums a step of the second launch, and its warps: a sample of 262,144 elements has 1,024."""


def _rows(tensors: list[Tensor | None]) -> tuple[list[Tensor | None], list[int]]:
    """The tensors with their samples contiguous, and the strides between samples. The slices of a stored trajectory are not copied."""
    tensors = [t.float() if t is not None and t.dtype == torch.float64 else t for t in tensors]
    rows = [t if t is None or t[:1].is_contiguous() else t.contiguous() for t in tensors]
    return rows, [0 if t is None else t.stride(0) for t in rows]


def _bits(step: list[Tensor]) -> list[Tensor]:
    """The coefficients as their kernels read them."""
    return [c.contiguous().view(torch.int64) for c in step]


def _score(
    tensors: list[Tensor | None], step: list[Tensor], guidance: float, rescale: bool, published: bool, flow_grpo_kl: bool, rollout: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Two launches; tensors: x, v, v_uncond, x_next (written in a rollout), noise, seeds, v_ref, v_old."""
    x, v_ref, v_old = tensors[0], *tensors[6:]
    logp, kl, drift = outputs = empty_scores(x, v_ref, v_old)
    batch, n = len(x), x.shape[1:].numel()
    if batch:
        num_tiles, sizes = tiling(x.shape, rescale)
        num_strips = triton.cdiv(num_tiles, STRIP)
        num_sums = num_strips * (sizes["TOKENS"] * sizes["PAD"] // SEGMENT)
        kinds = 1 + (v_ref is not None) + (v_old is not None)
        partial = torch.empty((kinds, batch, num_sums), dtype=torch.float32, device=x.device)
        a, b, std, diffusion = _bits(step)
        rows, strides = _rows(tensors[:5] + tensors[6:])
        if n:
            forward_kernel[(batch * num_strips,)](
                *rows[:5],
                tensors[5],
                *rows[5:],
                *(a, b, std, partial, n, num_tiles, num_strips, batch * num_sums),
                *strides,
                guidance,
                ROLLOUT=rollout,
                RESCALE=rescale,
                **sizes,
                STRIP=STRIP,
                SEGMENT=SEGMENT,
                num_warps=num_warps(sizes),
                num_stages=1,
            )
        lanes, finish_warps = FINISH
        finish_kernel[(batch,)](
            *(partial, b, std, diffusion, logp, kl if v_ref is not None else None, drift if v_old is not None else None),
            *(num_sums, batch * num_sums, max(n, 1)),
            PUBLISHED=published,
            FLOW_GRPO_KL=flow_grpo_kl,
            LANES=lanes,
            num_warps=finish_warps,
            num_stages=1,
        )
    return outputs


@torch.library.custom_op("aot_fast::flow_step", mutates_args=())
def _flow_step(
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    step: list[Tensor],
    guidance: float,
    rescale: bool,
    published: bool,
    storage: torch.dtype,
) -> tuple[Tensor, Tensor]:
    narrow = torch.float32 if storage == torch.float64 else storage
    x_next = torch.empty(x.shape, dtype=narrow, device=x.device)
    tensors = [x, v, v_uncond, x_next, noise, None if seeds is None else seeds.contiguous(), None, None]
    logp, _, _ = _score(tensors, step, guidance, rescale, published, False, rollout=True)
    return x_next.to(storage), logp


_flow_step.register_fake(fake_step)


@torch.library.custom_op("aot_fast::flow_logp", mutates_args=())
def _flow_logp(
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    x_next: Tensor,
    v_ref: Tensor | None,
    v_old: Tensor | None,
    step: list[Tensor],
    guidance: float,
    rescale: bool,
    published: bool,
    flow_grpo_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _score([x, v, v_uncond, x_next, None, None, v_ref, v_old], step, guidance, rescale, published, flow_grpo_kl, rollout=False)


_flow_logp.register_fake(fake_logp)


@torch.library.custom_op("aot_fast::flow_logp_gradient", mutates_args=())
def _flow_logp_gradient(
    x: Tensor,
    v: Tensor,
    v_uncond: Tensor | None,
    x_next: Tensor,
    v_ref: Tensor | None,
    v_old: Tensor | None,
    step: list[Tensor],
    dlogp: Tensor | None,
    dkl: Tensor | None,
    ddrift: Tensor | None,
    guidance: float,
    rescale: bool,
    published: bool,
    flow_grpo_kl: bool,
) -> tuple[Tensor, Tensor]:
    dv, dv_uncond = empty_gradients(v, v_uncond)
    if v.numel():
        num_tiles, sizes = tiling(x.shape, rescale)
        rows, strides = _rows([x, v, v_uncond, x_next, v_ref, v_old])
        upstream = [dlogp, dkl, ddrift]
        backward_kernel[(len(x) * num_tiles,)](
            *rows,
            *_bits(step),
            *upstream,
            *(dv, None if v_uncond is None else dv_uncond, x.shape[1:].numel(), num_tiles),
            *strides,
            *(0 if up is None else up.stride(0) for up in upstream),
            guidance,
            PUBLISHED=published,
            FLOW_GRPO_KL=flow_grpo_kl,
            RESCALE=rescale,
            **sizes,
            num_warps=num_warps(sizes),
        )
    return dv, dv_uncond


_flow_logp_gradient.register_fake(fake_logp_gradient)


def flow_step_triton(*arguments) -> FlowStep:
    """As flow_step_reference."""
    return flow_step_by("aot_fast", *arguments)


def flow_logp_triton(*arguments) -> FlowLogProb:
    """As flow_logp_reference."""
    return flow_logp_by("aot_fast", *arguments)


def builds() -> list[Build]:
    """What ships, for the gates."""
    finish = {"PUBLISHED": False, "FLOW_GRPO_KL": False, "LANES": FINISH[0]}
    made = [_build(f"flow finish{name}", finish_kernel, "fp32", given, finish) for name, given in (("", set()), (" all", {"kl", "drift"}))]
    for dtype, guide in itertools.product(("bf16", "fp32"), ("", " rescaled", " mixed")):
        velocities = {"v_uncond", "dv_uncond"} if guide else set()
        _, sizes = tiling(torch.Size((1, 4096, 64)), guide == " rescaled")
        forward = {"RESCALE": guide == " rescaled", **sizes, "STRIP": STRIP, "SEGMENT": SEGMENT}
        backward = {"RESCALE": guide == " rescaled", **sizes, "PUBLISHED": False, "FLOW_GRPO_KL": False}
        for noise in ("noise", "seeds", "deterministic"):
            made.append(_build(f"flow_step {noise}{guide}", forward_kernel, dtype, velocities | {noise}, forward | {"ROLLOUT": True}))
        for ref, old in itertools.product(("", " ref"), ("", " old")):
            given = velocities | ({"v_ref", "dkl"} if ref else set()) | ({"v_old", "ddrift"} if old else set())
            made.append(_build(f"flow_logp forward{ref}{old}{guide}", forward_kernel, dtype, given, forward | {"ROLLOUT": False}))
            made.append(_build(f"flow_logp backward{ref}{old}{guide}", backward_kernel, dtype, given | {"dlogp"}, backward))
    return made


def _build(name: str, kernel: Any, dtype: str, given: set[str], constants: dict[str, Any]) -> Build:
    """given: which of the optional tensors the kernel gets."""
    names = set(kernel.arg_names)
    optional = {"v_uncond", "noise", "seeds", "v_ref", "v_old", "dlogp", "dkl", "ddrift", "dv_uncond", "kl", "drift"}
    constants = constants | dict.fromkeys(names & optional - given)
    constants |= dict.fromkeys(names & {"dlogp_stride", "dkl_stride", "ddrift_stride"}, 1)
    kinds = dict.fromkeys(("a", "b", "std", "diffusion", "seeds"), "*i64") | {"guidance": "fp32"}
    kinds |= dict.fromkeys(("partial", "logp", "kl", "drift", "dlogp", "dkl", "ddrift"), "*fp32")
    kinds |= {k: "i32" for k in names if k.endswith("stride") or k.startswith("num_") or k == "n"}
    arguments = {k: kinds.get(k, f"*{dtype}") for k in kernel.arg_names if k not in constants}
    divisible = frozenset(k for k, kind in arguments.items() if kind == "i32") - {"num_tiles", "num_strips"}
    warps = num_warps(constants) if "TOKENS" in constants else FINISH[1]
    return Build(f"{name} {dtype}", kernel, arguments, constants, warps, divisible=divisible)
