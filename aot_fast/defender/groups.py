"""Groups of answers, and dynamic sampling: draw prompts until enough groups carry a gradient (MATH.md section 2).

Groups are small (tokens, log-probs, rewards) and known to every rank; pictures are not in them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from aot_fast.defender.counters import rollout_counters
from aot_fast.defender.drawing import Response, Sampling
from aot_fast.defender.model import Defender
from aot_fast.defender.prompts import Prompts
from aot_fast.defender.reward import find_reward, guarded, overlong_penalty
from aot_fast.defender.rollout import sample
from aot_fast.engine import seed_of


@dataclass(frozen=True)
class Group:
    """The answers to one prompt."""

    example: int
    """Index in the phase's examples."""
    key: str
    """Hash of prompt and image bytes."""
    responses: tuple[Response, ...]
    rewards: tuple[float, ...]
    correct: tuple[bool, ...]
    version: int
    """Policy version that sampled them."""
    prompt_tokens: int = 0
    """0 in a bank saved before this was recorded."""
    images: tuple[tuple[int, int, int], ...] = ()
    """(frames, rows, columns) of patches of each of the prompt's images."""

    @property
    def mixed(self) -> bool:
        """0 < #correct < G: the group has a gradient. On correctness, never on the shaped reward."""
        return 0 < sum(self.correct) < len(self.correct)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, num_examples: int) -> torch.Tensor:
    return torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed_of(seed, "epoch", epoch)))


@dataclass
class Stream:
    """Where dynamic sampling stands in its phase; part of the checkpoint."""

    seed: int
    """Seed of the phase: of its order and of every sample."""
    consumed: int = 0
    """Prompts drawn so far."""
    bank: list[Group] = field(default_factory=list)
    """Surplus groups, oldest first."""

    def draw(self, count: int, num_examples: int) -> list[tuple[int, int]]:
        """The next (draw number, example index) pairs; every epoch has an order of its own."""
        drawn = []
        for number in range(self.consumed, self.consumed + count):
            epoch, place = divmod(number, num_examples)
            drawn.append((number, int(_order(self.seed, epoch, num_examples)[place])))
        self.consumed += count
        return drawn

    def coming(self, count: int, num_examples: int) -> list[tuple[int, int]]:
        """What the next `draw` will give, without drawing it."""
        return Stream(self.seed, self.consumed).draw(count, num_examples)

    def state(self) -> dict[str, Any]:
        """Plain containers and tensors, for `torch.load(weights_only=True)`."""
        bank = [{**vars(group), "responses": [vars(r) for r in group.responses]} for group in self.bank]
        return {"seed": self.seed, "consumed": self.consumed, "bank": bank}

    @staticmethod
    def restore(state: dict[str, Any]) -> Stream:
        """Inverse of `state`."""
        bank = [Group(**{**g, "responses": tuple(Response(**r) for r in g["responses"])}) for g in state["bank"]]
        return Stream(state["seed"], state["consumed"], bank)


@dataclass(frozen=True)
class Collected:
    """What a rollout brought."""

    groups: list[Group]
    metrics: dict[str, float]


def collect(defender: Defender, prompts: Prompts, stream: Stream, stopping: Callable[[], bool] = lambda: False) -> Collected:
    """Groups for `steps_per_rollout` optimizer steps, the same on every rank.

    Draws until there are enough mixed groups or `max_generation_batches` is reached, then makes do with what there is.
    Surplus groups are banked with the policy version they came from. A collective.
    """
    config = defender.config
    wanted = config.prompts_per_step * config.steps_per_rollout
    oldest = defender.version - config.max_staleness * config.steps_per_rollout
    fresh = [group for group in stream.bank if group.version >= oldest]
    counts = {"stale": len(stream.bank) - len(fresh), "banked_used": min(wanted, len(fresh))}
    kept, seen, batches, start = fresh, [], 0, time.perf_counter()
    with defender.whole():
        while len(kept) < wanted and batches < config.max_generation_batches and not stopping():
            drawn = stream.draw(config.prompts_per_try or wanted - len(kept), len(prompts))
            groups = _roll(defender, prompts, stream.seed, drawn)
            seen += groups
            kept = kept + [group for group in groups if group.mixed]
            batches += 1
    stream.bank = kept[wanted:]
    coming = stream.coming(config.prompts_per_try or wanted, len(prompts))  # while the update runs
    prompts.prefetch(coming[i][1] for i in defender.runtime.mine(len(coming)))
    counts |= {"drawn": len(seen), "dropped": sum(not g.mixed for g in seen), "batches": batches, "bank": len(stream.bank)}
    counts["short"] = wanted - len(kept[:wanted])
    metrics = {f"groups/{name}": float(n) for name, n in counts.items()} | _rollout_metrics(seen)
    if seen:
        metrics |= rollout_counters(defender, seen, time.perf_counter() - start)
    return Collected(kept[:wanted], metrics)


def _roll(defender: Defender, prompts: Prompts, seed: int, drawn: list[tuple[int, int]]) -> list[Group]:
    """Answer the drawn prompts, each on the rank whose turn it is; every rank gets all groups in the order of drawing."""
    config, runtime = defender.config, defender.runtime
    sampling = Sampling(config.group_size, config.temperature, config.top_p, config.max_response_tokens)
    mine = [drawn[i] for i in runtime.mine(len(drawn))]
    prompts.prefetch(index for _, index in mine)
    seeds = [seed_of(seed, "draw", number) for number, _ in mine]
    answers = sample(defender, (prompts[index] for _, index in mine), seeds, sampling)
    groups = [(number, _group(defender, prompts, index, responses)) for (number, index), responses in zip(mine, answers)]
    everyone = sorted((pair for part in runtime.gather(groups) for pair in part), key=lambda pair: pair[0])
    return [group for _, group in everyone]


def _group(defender: Defender, prompts: Prompts, index: int, responses: list[Response]) -> Group:
    reward, seen = find_reward(defender.config.reward), prompts.seen(index)
    scored = [guarded(reward, response.text, seen.question) for response in responses]
    rewards = [value + overlong_penalty(len(r.ids), defender.config) for (value, _), r in zip(scored, responses)]
    correct = tuple(right for _, right in scored)
    return Group(index, seen.key, tuple(responses), tuple(rewards), correct, defender.version, seen.tokens, seen.images)


def _rollout_metrics(groups: list[Group]) -> dict[str, float]:
    if not groups:
        return {}
    responses = [r for g in groups for r in g.responses]
    rewards = [r for g in groups for r in g.rewards]
    finite = [r for r in rewards if math.isfinite(r)]
    return {
        "reward": sum(finite) / max(1, len(finite)),
        "reward/not_finite": float(len(rewards) - len(finite)),
        "accuracy": sum(sum(g.correct) for g in groups) / len(responses),
        "response/tokens": sum(len(r.ids) for r in responses) / len(responses),
        "response/truncated": sum(r.truncated for r in responses) / len(responses),
    }
