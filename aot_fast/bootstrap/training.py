"""The loop that all three small players are trained with: seeded by step, resumable to the bit."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

BatchLoss = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]
"""(step, generator) -> (loss, metrics to log). All randomness comes from the generator, which depends on (seed, step) alone."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast one model is trained."""

    steps: int
    lr: float
    """Of AdamW."""
    muon_lr: float = 0.0
    """Of Muon, which then trains the hidden matrices (bench/README.md, 2026-11-25). 0: AdamW trains all."""
    plain: tuple[str, ...] = ("embed", "lm_head", "probe")
    """Parts of names that AdamW keeps also when Muon is on: matrices that look words up, read them off, or modulate."""
    warmup_steps: int = 100
    decay_share: float = 0.5
    """Last share of the steps, over which the rates fall linearly to a fiftieth."""
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    """0 keeps no average of the weights."""
    save_every: int = 100
    log_every: int = 50
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Share of the full rates: linear warm-up, level, linear decay."""
        left = (self.steps - step) / max(1.0, self.decay_share * self.steps)
        return min(1.0, (step + 1) / max(1, self.warmup_steps)) * max(0.02, min(1.0, left))

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """AdamW, and Muon for the hidden matrices if it is on."""
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        hidden = [n for n, p in trained.items() if self.muon_lr and p.ndim == 2 and not any(part in n for part in self.plain)]
        rest = [parameter for name, parameter in trained.items() if name not in set(hidden)]
        made: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)]
        if hidden:
            made.append(torch.optim.Muon([trained[name] for name in hidden], lr=self.muon_lr, weight_decay=self.weight_decay))
        return made


def save_atomically(state: object, path: Path) -> None:
    """Write beside the target and rename, so that a killed run never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def step_generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def _ema_decay_at(decay: float, step: int) -> float:
    # The first weights are noise: a short memory early keeps them out of the average.
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def _update_ema(ema: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, value in model.state_dict().items():
        ema[name].lerp_(value, 1 - decay)


def train(model: nn.Module, batch_loss: BatchLoss, plan: Plan, folder: Path, stop_at: int | None = None) -> nn.Module:
    """Train `model` in place and load its averaged weights at the end; continues from `folder/state.pt` if that exists.

    `stop_at` ends early after that many steps with the state saved, as an interruption would.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizers = plan.optimizers(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    ema = {name: value.clone() for name, value in model.state_dict().items()} if plan.ema_decay else {}
    first, state_path = 0, folder / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema, first = state["ema"], state["step"]
    last = min(plan.steps, stop_at or plan.steps)
    model.train()
    start, log = time.perf_counter(), (folder / "train.jsonl").open("a", buffering=1)
    for step in range(first, last):
        loss, metrics = batch_loss(step, step_generator(plan.seed, step))
        model.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), plan.max_grad_norm)
        for optimizer, rate in zip(optimizers, rates):
            optimizer.param_groups[0]["lr"] = rate * plan.rate_at(step)
            optimizer.step()
        if plan.ema_decay:
            _update_ema(ema, model, _ema_decay_at(plan.ema_decay, step))
        if step % plan.log_every == 0 or step == plan.steps - 1:
            line = {"step": step, "loss": loss.item(), "grad_norm": norm.item(), **metrics, "seconds": time.perf_counter() - start}
            log.write(json.dumps({key: round(value, 6) for key, value in line.items()}) + "\n")
        if (step + 1) % plan.save_every == 0 or step + 1 == last:
            states = [optimizer.state_dict() for optimizer in optimizers]
            save_atomically({"model": model.state_dict(), "optimizers": states, "ema": ema, "step": step + 1}, state_path)
    log.close()
    if plan.ema_decay:
        model.load_state_dict(ema)
    return model.eval()
