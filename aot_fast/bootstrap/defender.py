"""The small Defender and its judge, in stages: both learn to see and to state facts; the Defender to answer in the world as it is, bias and
all; the judge to answer without the bias, and to count look-alikes apart."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from aot_fast.bootstrap.exchanges import Draw, draw_alike, draw_asked, draw_facts, draw_judges, draw_taught
from aot_fast.bootstrap.folders import build_tokenizer
from aot_fast.bootstrap.model import build_defender
from aot_fast.bootstrap.probe import WithProbe, probe_loss
from aot_fast.bootstrap.rows import answer_logits, image_features, pack_rows, patchify, pictures_of
from aot_fast.bootstrap.training import Plan, train
from aot_fast.data.scenes import SPLITS, sample_scene

SIGHT_PLAN = Plan(steps=600, lr=2e-3, muon_lr=0.02, warmup_steps=50, weight_decay=0.01, ema_decay=0.99)
"""The vision tower alone, on what its probe asks: six times cheaper a picture than with the language model, which waits for it anyway."""
SIGHT_PICTURES = 48
FACTS_PLAN = Plan(steps=800, lr=2e-3, muon_lr=0.02, warmup_steps=50, weight_decay=0.01, ema_decay=0.99)
"""The language model alone, on true statements: one token in four carries information, in a question one in forty-five."""
TAUGHT_PLAN = Plan(steps=1000, lr=2e-3, muon_lr=0.02, warmup_steps=50, weight_decay=0.01, ema_decay=0.995)
"""The Defender's answers, beside facts: mostly about what is learned slowest."""
ASKED_PLAN = Plan(steps=800, lr=2e-3, muon_lr=0.02, warmup_steps=50, weight_decay=0.01, ema_decay=0.99)
"""The world's own questions."""
JUDGES_PLAN = Plan(steps=1500, lr=2e-3, muon_lr=0.02, warmup_steps=50, weight_decay=0.01, ema_decay=0.995)
"""The judge's answers, beside facts."""
ALIKE_PLAN = Plan(steps=600, lr=1e-3, muon_lr=0.01, warmup_steps=50, weight_decay=0.01, ema_decay=0.99)
"""Mostly counts, in scenes whose objects share colours and shapes; half the rates, for the answers must not be forgotten."""
PROBE_WEIGHT = 2.0
"""Keeps the pictures readable, and their words' embeddings in step with them, while answers are learned."""


def _freeze(parameters: Iterable[nn.Parameter], frozen: bool = True) -> None:
    for parameter in parameters:
        parameter.requires_grad_(not frozen)


def train_sight(model: WithProbe, folder: Path, plan: Plan) -> None:
    """Train the vision tower, its probe and the words' embeddings in place; the language model's layers stay as they are."""
    split = SPLITS["bootstrap"]

    def batch_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        seeds = torch.randint(len(split), (SIGHT_PICTURES,), generator=generator).tolist()
        scenes = [sample_scene(split[seed]) for seed in seeds]
        with torch.autocast("cpu", torch.bfloat16):
            features = image_features(model.defender, *patchify(pictures_of(scenes)))
        loss, right = probe_loss(model, features, scenes)
        model.length.lerp_(features.detach().float().norm(dim=-1).mean(), 0.1)
        return loss, {"shape_accuracy": right}

    layers = model.defender.model.language_model.layers.parameters
    _freeze(layers())
    train(model, batch_loss, plan, folder)
    _freeze(layers(), False)
    model.join()


def train_language(model: WithProbe, draw: Draw, folder: Path, plan: Plan, stop_at: int | None = None) -> None:
    """Next tokens of the exchanges that `draw` gives, in place; the probe goes on."""
    tokenizer = build_tokenizer()

    def batch_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        scenes, exchanges = draw(generator)
        rows = pack_rows(model.defender, tokenizer, pictures_of(scenes), exchanges)
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets, features = answer_logits(model.defender, rows)
        # Summed over an answer: only its word and its letter carry information, the rest is format.
        answer_loss = F.cross_entropy(logits.float(), targets, reduction="sum") / len(exchanges) / len(exchanges[0])
        seen, _ = probe_loss(model, features, scenes)
        right = (logits.argmax(-1) == targets).float().mean()
        return answer_loss + PROBE_WEIGHT * seen, {
            "answer_loss": answer_loss.item(),
            "probe_loss": seen.item(),
            "token_accuracy": right.item(),
        }

    train(model, batch_loss, plan, folder, stop_at)


def train_eyes(folder: Path, plan: Plan = SIGHT_PLAN) -> WithProbe:
    """A Defender that sees, from scratch or from the state in `folder`: also the Attacker's text encoder."""
    model = WithProbe(build_defender(plan.seed))
    train_sight(model, folder / "sight", plan)
    return model


def train_reader(folder: Path, sight: Plan = SIGHT_PLAN, facts: Plan = FACTS_PLAN, stop_at: int | None = None) -> WithProbe:
    """A Defender that sees and states facts, from scratch or from the states in `folder`."""
    model = train_eyes(folder, sight)
    _train_spoken(model, draw_facts, folder / "facts", facts, stop_at)
    return model


@dataclass(frozen=True)
class Plans:
    """How the stages are trained."""

    sight: Plan = SIGHT_PLAN
    facts: Plan = FACTS_PLAN
    taught: Plan = TAUGHT_PLAN
    asked: Plan = ASKED_PLAN
    judges: Plan = JUDGES_PLAN
    alike: Plan = ALIKE_PLAN


def train_defender(folder: Path, plans: Plans = Plans(), stop_at: int | None = None) -> Qwen2_5_VLForConditionalGeneration:
    """The Defender, from scratch or from the states in `folder`.

    It has the weak spot that the small game is about: shown something red, it says that what is asked for is there, which in the world's
    own pictures is true.
    """
    model = train_reader(folder, plans.sight, plans.facts)
    # Its probe is at 99 % of the shapes already; trained on, features grow to seven times their length in 600 steps.
    _train_spoken(model, draw_taught, folder, plans.taught)
    _train_spoken(model, draw_asked, folder / "asked", plans.asked, stop_at)
    return model.defender


def train_judge(folder: Path, plans: Plans = Plans(), stop_at: int | None = None) -> Qwen2_5_VLForConditionalGeneration:
    """The uniqueness judge, from scratch or from the states in `folder`; it shares sight and facts with the Defender.

    It must not count a red square and a blue circle as one red circle.
    """
    model = train_reader(folder, plans.sight, plans.facts)
    _train_spoken(model, draw_judges, folder / "judges", plans.judges)
    _train_spoken(model, draw_alike, folder / "alike", plans.alike, stop_at)
    return model.defender


def _train_spoken(model: WithProbe, draw: Draw, folder: Path, plan: Plan, stop_at: int | None = None) -> None:
    """`train_language` with the vision tower as it is."""
    vision = model.defender.model.visual.parameters
    _freeze(vision())
    train_language(model, draw, folder, plan, stop_at)
    _freeze(vision(), False)
