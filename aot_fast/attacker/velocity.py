"""One forward of the transformer for a batch of (sample, step) pairs: shared by the rollout and by the replay, so that they agree.

Legend: B pairs, N target tokens, M reference tokens, T prompt tokens (padded), D text width, c latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aot_fast.attacker.encoding import Encoding


class Velocity(NamedTuple):
    """What the operators take: the conditional velocity, and the unconditional one under guidance."""

    v: Tensor
    """[B, N, 4c]"""
    v_uncond: Tensor | None


def velocity(forward: Callable, encodings: Sequence[Encoding], x: Tensor, sigmas: Sequence[float], guided: bool) -> Velocity:
    """Velocities at x ([B, N, 4c]) and noise levels `sigmas`; all encodings have equal shapes.

    With guidance both prompts run in one forward of 2B: under ZeRO-3 the weights are gathered once.
    """
    prompts = [e.prompt for e in encodings] + [e.negative for e in encodings if guided]
    text, mask = pad_prompts(prompts)
    tokens = torch.cat([x, torch.stack([e.reference for e in encodings])], 1)  # [B, N + M, 4c]
    # As the pipelines do: the time on the scheduler's 0..1000 scale is rounded to the model's dtype first.
    time = (torch.tensor(sigmas, device=x.device) * 1000).to(x.dtype) / 1000
    if guided:
        tokens, time = tokens.repeat(2, 1, 1), time.repeat(2)
    out = forward(
        hidden_states=tokens,
        timestep=time,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        img_shapes=[encodings[0].shapes] * len(tokens),
        return_dict=False,
    )[0][:, : x.shape[1]]
    return Velocity(*out.chunk(2)) if guided else Velocity(out, None)


def pad_prompts(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[B, T, D] padded with zeros behind, and the mask [B, T] (None when nothing was padded, as in the pipelines)."""
    lengths = [len(prompt) for prompt in prompts]
    padded = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    if min(lengths) == max(lengths):
        return padded, None
    positions = torch.arange(padded.shape[1], device=padded.device)
    return padded, positions[None] < torch.tensor(lengths, device=padded.device)[:, None]
