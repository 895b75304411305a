"""Exponential moving average of the trained weights, kept and applied on this rank's ZeRO-3 slices: no whole copy anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aot_fast.engine import Player


class Ema:
    """avg <- decay * avg + (1 - decay) * weight, in fp32, after each applied optimizer step."""

    def __init__(self, player: Player, decay: float):
        self.decay = decay
        self.trained: dict[str, nn.Parameter] = {n: p for n, p in player.module.named_parameters() if p.requires_grad}
        self.averages = {name: parameter.ds_tensor.detach().float().clone() for name, parameter in self.trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current weights."""
        for name, parameter in self.trained.items():
            self.averages[name].lerp_(parameter.ds_tensor.float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in the place of the weights. A collective; open it around `Player.gathered`, not inside."""
        kept = {name: parameter.ds_tensor.detach().clone() for name, parameter in self.trained.items()}
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, shards: dict[str, Tensor]) -> None:
        parameters = list(self.trained.values())
        # Small parameters stay gathered between steps; drop those whole copies, or they would hide the new slices.
        parameters[0].partition(param_list=parameters, has_been_updated=False)
        for name, parameter in self.trained.items():
            parameter.ds_tensor.copy_(shards[name])
        persistent = [p for p in parameters if p.ds_persist]
        if persistent:
            persistent[0].all_gather(param_list=persistent)

    def state(self) -> dict[str, Tensor]:
        """This rank's averages on the host."""
        return {f"ema.{name}": shard.cpu() for name, shard in self.averages.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`. Raises ValueError when names or shapes differ."""
        expected = {f"ema.{name}": tuple(shard.shape) for name, shard in self.averages.items()}
        if expected != {name: tuple(shard.shape) for name, shard in state.items()}:
            raise ValueError("the saved EMA has other names or shapes: attacker.lora, attacker.model or the number of ranks was changed")
        for name, shard in self.averages.items():
            shard.copy_(state[f"ema.{name}"])
