"""Several optimizer steps on one rollout, and the ratio's old log-probs: the rollout's, or the trainer's own."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from aot_fast.attacker.flow_grpo import ScoredGroup, update
from aot_fast.attacker.old_logp import anchored, by_step
from aot_fast.attacker.rollout import rollout
from aot_fast.config import OptimizerConfig
from tests.attacker.rollouts import examples, gradients, scored
from tests.attacker.tiny_pipeline import LORA

PLACE = {"seed": 0, "round": 1, "step": 0}


def off(groups, by):
    """The same groups, the log-probs that the rollout recorded off by `by`."""

    def moved(sample):
        return replace(sample, steps=tuple(replace(step, logp=step.logp + by) for step in sample.steps))

    return [replace(one, group=replace(one.group, samples=tuple(map(moved, one.group.samples)))) for one in groups]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_step_trains_on_its_own_prompts(world):
    """Prompts 0 to 3 and 4 to 7, whichever rank rolled them out."""
    found = [[], []]
    for rank in range(world):
        runtime = SimpleNamespace(mine=lambda count, rank=rank: range(rank, count, world))
        attacker = SimpleNamespace(runtime=runtime, config=SimpleNamespace(prompts_per_step=4))
        parts = by_step(attacker, list(runtime.mine(8)), 2)
        found = [a + b for a, b in zip(found, parts)]
    assert [sorted(part) for part in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("variant", ["grpo", "guard"])
def test_recomputed_ratios_are_one_at_other_shapes(variant, base_config, load):
    """The rollout's batches hold 4 samples, the update's micro-batches 3: what the rollout recorded is compared and does not enter."""
    config = replace(base_config, lora=LORA, microbatch=3, old_logp="recompute", variant=variant)
    attacker = load(config, seed=1)
    groups = scored(rollout(attacker, examples(2), **PLACE))
    metrics, expected = gradients(attacker, groups)
    assert metrics["kl"] == 0 and metrics["logp_mismatch"] <= 1e-5 and metrics.get("drift", 0) == 0
    metrics, found = gradients(attacker, off(groups, 0.01))
    assert metrics["kl"] == 0 and metrics["logp_mismatch"] == pytest.approx(0.01, rel=1e-2)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    attacker.config = replace(attacker.config, old_logp="rollout")
    assert gradients(attacker, off(groups, 0.01))[0]["kl"] > 0


@pytest.mark.parametrize("variant", ["grpo", "guard"])
def test_the_second_step_compares_with_the_weights_that_sampled(variant, base_config, load):
    """The trainer's log-probs, formed before the first step, for the rollout's: alike to 1e-5, and the policy has moved much further."""
    config = replace(base_config, lora=LORA, prompts_per_step=1, old_logp="recompute", variant=variant, optimizer=OptimizerConfig(lr=1e-2))
    attacker = load(config, seed=1)
    groups = scored(rollout(attacker, examples(2), **PLACE))
    first, second = anchored(attacker, by_step(attacker, off(groups, 0.01), 2))
    recorded = [step for one in groups[1:] for sample in one.group.samples for step in sample.steps]
    made = [step for one in second for sample in one.group.samples for step in sample.steps]
    assert all(torch.allclose(a.trainer_logp, b.logp, atol=1e-5) for a, b in zip(made, recorded, strict=True))
    assert not any(step.trainer_logp.requires_grad for step in made)
    assert update(attacker, first)["kl"] == 0
    moved = update(attacker, second)
    assert moved["kl"] > 0 and moved["logp_mismatch"] == pytest.approx(0.01, rel=1e-2) and (variant == "grpo" or moved["drift"] > 1e-9)


def test_what_the_rollout_recorded_is_left_alone_unless_asked_for(base_config, load):
    attacker = load(replace(base_config, lora=LORA), seed=1)
    parts = [[ScoredGroup(None, ())], [ScoredGroup(None, ())]]
    assert anchored(attacker, parts) is parts
    attacker.config = replace(attacker.config, old_logp="recompute")
    assert anchored(attacker, parts[:1]) == parts[:1]


def test_nft_takes_one_step_a_rollout(base_config, load):
    with pytest.raises(ValueError, match="attacker.steps_per_rollout = 2 with attacker.variant = nft"):
        load(replace(base_config, lora=LORA, variant="nft", dynamics="ode", steps_per_rollout=2))
