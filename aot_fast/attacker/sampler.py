"""Denoise edits: ODE steps, and inside the window stochastic steps that are recorded for training.

Legend: B samples, N target tokens, c latent channels, S steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_shift
from torch import Tensor

import aot_fast.kernels as K
from aot_fast.attacker.batching import batches
from aot_fast.attacker.encoding import Encoding, blank_encoding
from aot_fast.attacker.model import Attacker
from aot_fast.attacker.velocity import Velocity, velocity
from aot_fast.config import AttackerConfig
from aot_fast.engine import evened, seed_of


@dataclass(frozen=True)
class TrainedStep:
    """One stochastic step of one sample: all that training needs to score it again."""

    x: Tensor
    """[N, 4c] in the storage dtype."""
    x_next: Tensor
    """[N, 4c], as rounded before it was scored."""
    sigma: float
    sigma_next: float
    sigma_max: float
    """Second sigma of the schedule (MATH.md section 3: it stands for s~ where sigma is 1)."""
    logp: Tensor
    """0-d fp32, recorded at the rollout."""
    velocity: Tensor | None
    """[N, 4c] guided velocity of the rollout's policy; kept for the variants that need its drift."""
    trainer_logp: Tensor | None = None
    """0-d fp32: the trainer's own under the same weights, where it was asked for (old_logp.py)."""


@dataclass(frozen=True)
class Sample:
    """One edit in latent space."""

    latents: Tensor
    """[N, 4c] at sigma 0."""
    steps: tuple[TrainedStep, ...]
    """The window's steps; empty for a plain ODE sample."""


@torch.no_grad()
def sample(
    attacker: Attacker, encodings: Sequence[Encoding], start_seeds: Sequence[int], step_seeds: Sequence[int], window: tuple[int, int] | None
) -> list[Sample]:
    """One `Sample` for each encoding; call it inside `attacker.sampling()`. With `config.gather` block it is a collective.

    start_seeds: of the start noise; equal seeds give equal noise. step_seeds: each step's noise derives from (step seed, step).
    window: steps [start, stop) that follow `config.dynamics`; the others, or all when it is None, are ODE steps. The ODE steps before the
    window are taken once for samples with the same encoding and the same start noise (`config.shared_prefix`). A sample does not depend on
    the others or on `config.rollout_batch`, but for rounding (1e-5 in fp32).
    """
    first, last = window if window and attacker.config.dynamics != "ode" else (0, 0)
    path = strides(attacker.config, last)
    starts = list(zip(map(id, encodings), start_seeds)) if attacker.config.shared_prefix and first else list(range(len(encodings)))
    owners = {start: i for i, start in reversed(list(enumerate(starts)))}  # the first sample that starts so
    begun: dict[int, Tensor] = {}
    for indices in _alike(attacker, encodings, owners.values()):
        picked = [encodings[i] for i in indices] or [blank_encoding(attacker)]
        x = start_noise(attacker, picked[0], [start_seeds[i] for i in indices] or [0])
        begun |= zip(indices, _denoise(attacker, picked, x, [], path[:first], (0, 0))[0])
    made: list[Sample | None] = [None] * len(encodings)
    for indices in _alike(attacker, encodings, range(len(encodings))):
        picked = [encodings[i] for i in indices] or [blank_encoding(attacker)]
        x = torch.stack([begun[owners[starts[i]]] for i in indices]) if indices else picked[0].reference[None]
        x, records = _denoise(attacker, picked, x, [step_seeds[i] for i in indices] or [0], path[first:], (first, last))
        for i, latents, recorded in zip(indices, x, zip(*records) if records else [()] * len(x)):
            made[i] = Sample(latents, tuple(recorded))
    return made


def _alike(attacker: Attacker, encodings: Sequence[Encoding], indices: Iterable[int]) -> list[list[int]]:
    """What is denoised together; where every forward is a collective, as often on every rank (an empty batch: along with the others)."""
    own = batches(list(indices), attacker.config.rollout_batch, lambda i: tuple(encodings[i].shapes))
    return evened(attacker.runtime, own) if attacker.config.gather == "block" else own


def _denoise(
    attacker: Attacker,
    encodings: Sequence[Encoding],
    x: Tensor,
    step_seeds: Sequence[int],
    path: Sequence[tuple[int, int]],
    window: tuple[int, int],
) -> tuple[Tensor, list[list[TrainedStep]]]:
    """x [B, N, 4c] after the strides of `path`, and of each step inside the window what is recorded of every sample."""
    config = attacker.config
    forward = attacker.player if config.gather == "block" else attacker.player.module
    sigmas = schedule(attacker, x.shape[1])
    records: list[list[TrainedStep]] = []
    for k, after in path:
        stochastic = window[0] <= k < window[1]
        now = velocity(forward, encodings, x, [sigmas[k]] * len(x), config.guidance > 1)
        step = K.flow_step(
            x,
            now.v,
            sigmas[k],
            sigmas[after],
            dynamics=config.dynamics if stochastic else "ode",
            eta=config.eta,
            sigma_max=sigmas[1],
            seeds=torch.tensor([seed_of(seed, k) for seed in step_seeds], device=x.device) if stochastic else None,
            v_uncond=now.v_uncond,
            guidance=config.guidance,
            cps_logp=config.cps_logp,
        )
        if stochastic:
            levels = (sigmas[k], sigmas[after], sigmas[1])
            old = guided(now, config) if config.variant in ("guard", "dppo") else [None] * len(x)
            records.append([TrainedStep(*tensors, *levels, *rest) for *tensors, rest in zip(x, step.x_next, zip(step.logp, old))])
        x = step.x_next
    return x, records


def strides(config: AttackerConfig, stop: int) -> list[tuple[int, int]]:
    """(step, next step) of the schedule from noise to picture, in order; from the window's end at `stop` on, `tail_steps` of them."""
    left = config.num_steps - stop
    count = min(config.tail_steps, left) if stop and config.tail_steps else left
    points = [*range(stop), *(stop + round(i * left / count) for i in range(count + 1))]
    return list(zip(points, points[1:]))


def guided(now: Velocity, config: AttackerConfig) -> Tensor:
    """[B, N, 4c]: the velocity the step follows (true classifier-free guidance with Qwen-Image's norm rescale)."""
    return now.v if now.v_uncond is None else K.guided_velocity(now.v, now.v_uncond, guidance=config.guidance)


def start_noise(attacker: Attacker, encoding: Encoding, seeds: Sequence[int]) -> Tensor:
    """[B, N, 4c] standard normal noise in the storage dtype; made on the host, so that it is the same on every device."""
    shape = (encoding.size[0] * encoding.size[1], encoding.reference.shape[-1])
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(attacker.runtime.device, attacker.runtime.dtype)


def schedule(attacker: Attacker, num_tokens: int) -> list[float]:
    """S + 1 noise levels from 1 to 0: the scheduler's own, shifted by mu of the target's token count as in the pipelines."""
    settings, count = attacker.scheduler.config, attacker.config.num_steps
    mu = calculate_shift(
        num_tokens,
        settings.get("base_image_seq_len", 256),
        settings.get("max_image_seq_len", 4096),
        settings.get("base_shift", 0.5),
        settings.get("max_shift", 1.15),
    )
    attacker.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), mu=mu)
    return [min(1.0, sigma) for sigma in attacker.scheduler.sigmas.tolist()]  # the shift can round to a hair above 1


def draw_window(config: AttackerConfig, step: int, *parts: object) -> tuple[int, int]:
    """The [start, stop) of the stochastic steps of optimizer step `step` of a round, inside `window_range`, alike on all ranks: uniform and
    seeded by `parts`, or sliding (`window_order`)."""
    low, high = config.window_range
    number = step // max(config.window_stays, config.steps_per_rollout) if config.window_order == "slide" else seed_of(*parts, "window")
    start = low + number % (high - config.window - low + 1)
    return start, start + config.window
