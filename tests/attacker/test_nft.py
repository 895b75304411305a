"""DiffusionNFT: the equation, the same gradient however it is split, and that good samples become likelier than bad ones."""

from dataclasses import replace

import pytest
import torch

from aot_fast.attacker import nft
from aot_fast.attacker.flow_grpo import group_advantages
from aot_fast.attacker.rollout import rollout
from aot_fast.attacker.velocity import velocity
from aot_fast.config import OptimizerConfig
from aot_fast.engine import StepResult
from aot_fast.settings import SettingsError
from aot_fast.settings import load as load_settings
from tests.attacker.rollouts import examples, scored, take_gradients
from tests.attacker.tiny_pipeline import LORA


@pytest.fixture
def nft_config(base_config):
    return replace(base_config, lora=LORA, variant="nft", dynamics="ode", shared_noise=False)


def items_of(attacker, groups):
    advantages, _ = group_advantages(attacker, groups)
    return [
        item
        for part, row in zip(groups, advantages)
        for sample, verdict, advantage in zip(part.group.samples, part.verdicts, row)
        for item in nft.noised(attacker, part.group.encoding, sample, advantage, verdict.seed)
    ]


def gradients(attacker, groups):
    found = {}
    attacker.player.step = lambda healthy: found.update(take_gradients(attacker.player)) or StepResult(False, 0.0, 0.0)
    try:
        return nft.update(attacker, groups), found
    finally:
        del attacker.player.step


def test_loss_and_gradient_are_the_equations(nft_config, load):
    """With v' equal to v the gradient is that of A-weighted flow matching: of 2 (2 r - 1) / 2 |v - u|^2, r of the clipped advantage."""
    attacker = load(nft_config, seed=1)
    groups = scored(rollout(attacker, examples(1), seed=0, round=1, step=0))
    metrics, found = gradients(attacker, groups)
    items = items_of(attacker, groups)
    assert len(items) == len(groups[0].group.samples) * nft_config.window == metrics["samples"]
    x, u = torch.stack([i.x for i in items]), torch.stack([i.target for i in items])
    v = velocity(attacker.player, [i.encoding for i in items], x, [i.sigma for i in items], False).v
    r, error = torch.stack([i.optimality for i in items]), (v - u).square().mean((1, 2))
    assert r.min() < 0.5 < r.max()
    assert metrics["loss"] == pytest.approx(error.mean().item(), rel=1e-5)  # both branches lie equally far, on-policy
    attacker.player.backward(((2 * r - 1) * error).mean())
    expected = take_gradients(attacker.player)
    scale = max(float(g.abs().max()) for g in expected.values())
    # fp32: the away branch is formed as 2 v' - v - u, whose rounding is some 1e-7 of v.
    assert scale > 0 and all(float((found[k] - expected[k]).abs().max()) < 1e-5 * scale for k in expected)


def test_noised_latents_lie_on_the_line_to_their_noise(nft_config, load):
    attacker = load(nft_config, seed=1)
    group = rollout(attacker, examples(1), seed=0, round=1, step=0)[0]
    for item in nft.noised(attacker, group.encoding, group.samples[0], torch.tensor(0.0), 3):
        torch.testing.assert_close(item.x - item.sigma * item.target, group.samples[0].latents, rtol=1e-5, atol=1e-5)
        assert item.optimality == 0.5


def test_gradient_does_not_depend_on_the_microbatch(nft_config, load):
    attacker = load(nft_config, seed=1)
    groups = scored(rollout(attacker, examples(), seed=0, round=1, step=0))
    _, expected = gradients(attacker, groups)
    attacker.config = replace(attacker.config, microbatch=1)
    _, found = gradients(attacker, groups)
    scale = max(float(g.abs().max()) for g in expected.values())
    assert all(float((found[k] - expected[k]).abs().max()) < 1e-5 * scale for k in expected)


def test_a_rank_without_items_runs_one_that_counts_nothing(nft_config, load):
    attacker = load(nft_config, seed=1)
    loss = nft.nft_loss(attacker, [nft._blank(attacker)])
    assert loss.item() == 0
    attacker.player.backward(loss)
    assert all(not gradient.any() for gradient in take_gradients(attacker.player).values())


def test_a_good_sample_draws_the_velocity_and_a_bad_one_pushes_it_away(nft_config, load):
    attacker = load(replace(nft_config, optimizer=OptimizerConfig(lr=1e-3)), seed=1)
    groups = scored(rollout(attacker, examples(1), seed=0, round=1, step=0), lambda i, j: float(j == 0))
    items = items_of(attacker, groups)

    def errors():
        x, u = torch.stack([i.x for i in items]), torch.stack([i.target for i in items])
        with torch.no_grad():
            v = velocity(attacker.player, [i.encoding for i in items], x, [i.sigma for i in items], False).v
        return (v - u).square().mean((1, 2))

    good, before = torch.stack([i.optimality for i in items]) > 0.5, errors()
    for _ in range(3):
        assert nft.update(attacker, groups)["applied"] == 1
    change = errors() - before
    assert change[good].mean() < change[~good].mean()


def test_settings_refuse_what_nft_has_not():
    with pytest.raises(SettingsError, match="attacker.dynamics"):
        load_settings("tiny", ["--attacker.variant", "nft"])
    assert load_settings("tiny", ["--attacker.variant", "nft", "--attacker.dynamics", "ode"]).attacker.variant == "nft"
