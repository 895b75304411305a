"""The Attacker's reward: integrity of the targets, uniqueness, and how often the frozen Defender fails (MATH.md section 4).

The Defender comes in only as a function from pictures to answers. Nothing here is a collective: ranks score different numbers of edits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch
from PIL.Image import Image

from aot_fast.attacker.integrity import integrity, ramp
from aot_fast.attacker.judge import Answerer, Edit, Judge, Likelihood, load_judge
from aot_fast.config import RewardConfig
from aot_fast.data.schema import Answer, Example, Verdict
from aot_fast.engine import seed_of

__all__ = ["Answerer", "Edit", "Judge", "Likelihood", "load_judge", "score", "solvable"]

T = TypeVar("T")
R = TypeVar("R")


def score(
    edits: Sequence[Edit], config: RewardConfig, answerer: Answerer, judge: Judge | None, likelihood: Likelihood | None = None
) -> list[Verdict]:
    """A `Verdict` for each edit. judge None: every edit counts as unique. likelihood: asked instead of trials (efficacy: likelihood).

    What raises, or is None or not finite, for one edit gives that edit a NaN reward (quarantined: group_advantage leaves it out) and
    is said once; the others are scored. Raises ValueError for settings that contradict each other.
    """
    if config.efficacy == "consecutive" and config.consecutive > config.trials:
        raise ValueError(f"reward.consecutive = {config.consecutive} exceeds reward.trials = {config.trials}")
    if config.efficacy == "likelihood" and likelihood is None:
        raise ValueError(
            "reward.efficacy = 'likelihood' needs a Defender whose answers' likelihood can be had; use fraction or consecutive"
        )
    with ThreadPoolExecutor(1) as pool:  # SSIM is the host's work, judge and trials are the device's: neither waits for the other
        measuring = pool.submit(_each, edits, lambda e: [_integrity(edit, config) for edit in e], "integrity")
        unique = (
            _each(edits, lambda e: [math.nan if u is None else float(u) for u in judge(e)], "the uniqueness judge")
            if judge
            else [1.0] * len(edits)
        )
        failures, answers = _failures(edits, config, answerer, likelihood)
        boxes = measuring.result()
    return [_verdict(*row, config) for row in zip(edits, boxes, unique, failures, answers)]


def _failures(
    edits: Sequence[Edit], config: RewardConfig, answerer: Answerer, likelihood: Likelihood | None
) -> tuple[list[float], list[Sequence[Answer] | None]]:
    """Efficacy of each edit (NaN: not known), and the trials' answers, of which likelihood has none."""
    if config.efficacy == "likelihood":
        kept = _each(edits, lambda e: likelihood([edit.example for edit in e], [seen(edit) for edit in e]), "the Defender's likelihood")
        return [math.nan if p is None else softened(1 - p, config.efficacy_temperature) for p in kept], [()] * len(edits)
    answers = _each(edits, lambda e: _trials(e, config, answerer), "the Defender's trials")
    return [efficacy(trials, config) if trials else math.nan for trials in answers], answers


def solvable(examples: Sequence[Example], roundtrips: Sequence[Image], config: RewardConfig, answerer: Answerer, seed: int) -> list[bool]:
    """Whether the Defender answers rightly k of k times, k = `solvable_trials`, on the clean picture and on its VAE round trip."""
    clean = list(examples)
    coded = [replace(example, image=image, source="roundtrip") for example, image in zip(examples, roundtrips, strict=True)]
    seeds = [seed_of(seed, "solvable", example.source, example.question.key) for example in clean + coded]
    answers = answerer(clean + coded, config.solvable_trials, config.temperature, seeds)
    right = [all(answer.correct for answer in trials) for trials in answers]
    return [first and second for first, second in zip(right[: len(clean)], right[len(clean) :])]


def _each(edits: Sequence[Edit], function: Callable[[Sequence[Edit]], Sequence[R]], what: str) -> list[R | None]:
    """`function` of all edits at once; when that raises, of each alone, with None for those that raise."""
    try:
        results = list(function(edits))
        if len(results) != len(edits):
            raise ValueError(f"{what} gave {len(results)} results for {len(edits)} edits")
        return results
    except torch.OutOfMemoryError:
        raise  # no fault of a sample
    except Exception as error:  # whatever a plug-in or a picture raises must not take the group with it
        if len(edits) > 1:
            return [_each([edit], function, what)[0] for edit in edits]
        if edits:
            warnings.warn(f"{what} failed for {edits[0].example.question.id}: {error!r}; that sample is quarantined", stacklevel=2)
        return [None] * len(edits)


def _integrity(edit: Edit, config: RewardConfig) -> tuple[float, ...]:
    return integrity(edit.example.image, edit.image, edit.example.question.target_boxes, config.pad)


def seen(edit: Edit) -> Example:
    """The question with the edited picture."""
    return replace(edit.example, image=edit.image, source="edit", attacker_round=edit.attacker_round)


def _trials(edits: Sequence[Edit], config: RewardConfig, answerer: Answerer) -> list[list[Answer]]:
    seeds = [seed_of(edit.seed, "trials") for edit in edits]
    return answerer([seen(edit) for edit in edits], config.trials, config.temperature, seeds)


def softened(probability: float, temperature: float) -> float:
    """The probability whose odds are those of `probability` to the power of 1 / temperature."""
    if not 0 < probability < 1:  # certain, NaN, or out of [0, 1] by rounding
        return probability if math.isnan(probability) else min(1.0, max(0.0, probability))
    return 1 / (1 + (1 / probability - 1) ** (1 / temperature))


def efficacy(answers: Sequence[Answer], config: RewardConfig) -> float:
    """e in [0, 1]: the share of wrong answers, or 1 only if the first `consecutive` are all wrong."""
    wrong = [not answer.correct for answer in answers]
    if config.efficacy == "consecutive":
        return float(all(wrong[: config.consecutive]))
    return sum(wrong) / len(wrong)


def combine(w: float, q: float, u: float, e: float, config: RewardConfig) -> float:
    """R = w(q) u e (gated), or w_e e + w_q q + w_u u (weighted)."""
    if config.kind == "gated":
        return w * u * e
    w_e, w_q, w_u = config.weights
    return w_e * e + w_q * q + w_u * u


def _verdict(
    edit: Edit,
    boxes: tuple[float, ...] | None,
    unique: float | None,
    e: float,
    answers: Sequence[Answer] | None,
    config: RewardConfig,
) -> Verdict:
    q = min(boxes) if boxes else math.nan
    u = math.nan if unique is None else float(unique)
    w = ramp(q, config.q_low, config.q_high) if math.isfinite(q) else math.nan
    known = all(map(math.isfinite, (q, u, e)))
    reward = combine(w, q, u, e, config) if known else math.nan
    return Verdict(
        question_id=edit.example.question.id,
        prompt=edit.prompt,
        seed=edit.seed,
        attacker_round=edit.attacker_round,
        integrity=boxes or (math.nan,),
        ramp=w,
        uniqueness=u,
        efficacy=e,
        answers=tuple(answer.text for answer in answers or ()),
        reward=reward,
        accepted=known and w > 0 and u == 1 and e > 0,
    )
