"""Bytes that the Triton kernels move and launches they take, counted while they are interpreted, against the floor of their operator.

    python -m aot_fast.kernels.traffic [--json]

Counted are the elements under the masks of the kernels' own loads and stores: what a cache saves, or a sector wastes, is not seen. fp16
stands for bf16, which the interpreter gets wrong. N tokens, V vocabulary, n elements of a flow batch.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor

ROWS, VOCABULARY = 4, 38_016
"""V: a quarter of Qwen2.5's 152,064, which ends inside a tile as that does."""
TOKENS = 8192
BATCH, LATENTS = 2, (1024, 64)


@dataclass
class Counted:
    """What some launches did."""

    loaded: int = 0
    stored: int = 0
    launches: int = 0

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored


@contextmanager
def counting() -> Iterator[Counted]:
    """Counts every launch inside. Raises RuntimeError where kernels are compiled: only the interpreter can be watched."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET: expected 1 before triton is imported")
    from triton.runtime import interpreter

    seen = Counted()
    builder = type(interpreter.interpreter_builder)
    load, store, launch = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__

    def counted_load(self, ptrs, mask, *rest):
        value = load(self, ptrs, mask, *rest)
        seen.loaded += int(mask.data.sum()) * value.data.itemsize
        return value

    def counted_store(self, ptrs, value, mask, *rest):
        seen.stored += int(mask.data.sum()) * value.data.itemsize
        return store(self, ptrs, value, mask, *rest)

    def counted_launch(self, *arguments, **options):
        seen.launches += 1
        return launch(self, *arguments, **options)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(interpreter.GridExecutor, "__call__", counted_launch),
    ):
        yield seen


@dataclass(frozen=True)
class Case:
    """An operator, and what it cannot do without."""

    name: str
    floor_bytes: int
    run: Callable[[], Tensor | None]
    backward: bool = False
    """Count the backward pass of what `run` returns, and not `run` itself."""


def cases() -> list[Case]:
    """The operators whose time is memory traffic; floors as in their modules."""
    import aot_fast.kernels as K

    g = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=g)
    logits = normal(ROWS, VOCABULARY).half().requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS,), generator=g)
    matrix = logits.numel() * 2
    logp, old, advantages = normal(TOKENS).requires_grad_(), normal(TOKENS), normal(TOKENS)
    mask = torch.ones(TOKENS, dtype=torch.bool)
    x, v, ref, unconditional = (normal(BATCH, *LATENTS).half() for _ in range(4))
    v.requires_grad_()
    latents = x.numel() * 2
    seeds, noise = torch.arange(BATCH), normal(x.shape).half()

    def step(**drawn: Tensor) -> Tensor:
        return K.flow_step(x, v.detach(), 0.8, 0.7, eta=0.7, **drawn).logp

    def replay(**more: Tensor) -> Tensor:
        scored = K.flow_logp(x, v, x, 0.8, 0.7, dynamics="flow_sde", eta=0.7, **more)
        return scored.logp.sum() + (0 if scored.kl is None else scored.kl.sum())

    def loss() -> Tensor:
        return K.policy_loss(logp, advantages, old_logp=old, mask=mask, num_tokens=float(TOKENS)).loss

    def velocity() -> Tensor:
        return K.guided_velocity(v, unconditional, guidance=4.0).sum()

    def probabilities() -> Tensor:
        return K.logprob(logits, targets).logp.sum()

    return [
        Case("logprob forward", matrix, probabilities),
        Case("logprob backward", 2 * matrix, probabilities, backward=True),
        Case("policy_loss forward", TOKENS * (4 + 4 + 4 + 1 + 4), loss),
        Case("policy_loss backward", TOKENS * (4 + 4), loss, backward=True),
        Case("guided_velocity forward", 2 * latents + 2 * latents, velocity),
        Case("guided_velocity backward", 2 * latents + 2 * latents + 2 * latents, velocity, backward=True),
        Case("flow_step, seeds", 3 * latents, lambda: step(seeds=seeds)),
        Case("flow_step, noise", 4 * latents, lambda: step(noise=noise)),
        Case("flow_logp forward", 3 * latents, replay),
        Case("flow_logp backward", 4 * latents, replay, backward=True),
        Case("flow_logp + kl forward", 4 * latents, lambda: replay(v_ref=ref)),
        Case("flow_logp + kl backward", 5 * latents, lambda: replay(v_ref=ref), backward=True),
    ]


def counted() -> Iterator[dict]:
    """A row for each case: its name, bytes, floor and launches."""
    import aot_fast.kernels as K

    for case in cases():
        with K.backend("triton"):
            if case.backward:
                value = case.run()
                with counting() as seen:
                    value.backward()
            else:
                with counting() as seen:
                    case.run()
        yield {"name": case.name, "bytes": seen.bytes, "floor": case.floor_bytes, "launches": seen.launches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is later
    if not args.json:
        print(f"{'operator':30s}{'launches':>10s}{'bytes':>12s}{'floor':>12s}{'ratio':>8s}")
    for row in counted():
        line = f"{row['name']:30s}{row['launches']:10d}{row['bytes']:12,d}{row['floor']:12,d}{row['bytes'] / row['floor']:8.3f}"
        print(json.dumps(row) if args.json else line, flush=True)


if __name__ == "__main__":
    main()
