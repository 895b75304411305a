"""The Flow-GRPO update: ratio one, the same gradient however it is split, quarantine, and that it learns."""

import math
import os
from dataclasses import replace

import pytest
import torch

import aot_fast.kernels as K
from aot_fast.attacker.flow_grpo import ScoredGroup, clip_range, judged, update
from aot_fast.attacker.replay import Item, replay, replay_batches
from aot_fast.attacker.rollout import rollout
from aot_fast.config import OptimizerConfig, RewardConfig
from aot_fast.data.schema import Answer
from tests.attacker.rollouts import examples, gradients, scored, take_gradients, verdict
from tests.attacker.tiny_pipeline import LORA, perturb


def relative(ours, theirs):
    """Largest difference of any parameter's gradient, over the largest gradient."""
    scale = max(float(g.abs().max()) for g in theirs.values())
    return max(float((ours[k] - theirs[k]).abs().max()) for k in theirs) / scale


@pytest.mark.parametrize("dynamics", ["flow_sde", "dance", "cps"])
def test_replayed_logp_equals_the_recorded_one(dynamics, base_config, load):
    """Exactly, where replay and rollout ran at the same shapes; 1e-5 otherwise (DESIGN.md rule 4)."""
    attacker = load(replace(base_config, dynamics=dynamics, guidance=2.0 if dynamics == "dance" else 1.0), seed=1)
    groups = rollout(attacker, examples(1), seed=0, round=1, step=0)
    same_step = [Item(groups[0].encoding, made.steps[0], torch.ones(())) for made in groups[0].samples]
    now = replay(attacker, same_step)
    assert len(same_step) == attacker.config.rollout_batch and torch.equal(now.logp, now.old_logp)
    attacker.config = replace(attacker.config, microbatch=3)
    metrics, _ = gradients(attacker, scored(groups))
    assert metrics["logp_mismatch"] <= 1e-5


def test_mismatch_is_seen_when_the_weights_moved_behind_its_back(base_config, load):
    attacker = load(replace(base_config, lora=LORA), seed=1)
    groups = rollout(attacker, examples(1), seed=0, round=1, step=0)
    perturb(attacker.player, 2)
    assert gradients(attacker, scored(groups))[0]["logp_mismatch"] > 1e-4


@pytest.mark.parametrize("extra", [{}, {"guidance": 2.0}, {"beta": 0.1, "dynamics": "cps", "variant": "guard"}], ids=str)
def test_gradient_does_not_depend_on_the_microbatch_or_the_order(extra, base_config, load):
    """Micro-batches of 1, 2 and 4, groups and samples shuffled, checkpointing: 1e-5 relative (DESIGN.md rule 7)."""
    config = replace(base_config, lora=LORA, **extra)
    attacker = load(config, seed=1)
    groups = scored(rollout(attacker, examples(), seed=0, round=1, step=0))
    baseline, expected = gradients(attacker, groups)
    assert max(float(g.abs().max()) for g in expected.values()) > 0
    shuffled = [
        ScoredGroup(replace(part.group, samples=part.group.samples[::-1], edits=part.group.edits[::-1]), part.verdicts[::-1])
        for part in groups[::-1]
    ]
    for size, order in ((1, groups), (2, shuffled)):
        attacker.config = replace(config, microbatch=size)
        metrics, found = gradients(attacker, order)
        assert relative(found, expected) < 1e-5
        assert metrics["loss"] == pytest.approx(baseline["loss"], abs=1e-5)
    if not extra:
        attacker.player.module.enable_gradient_checkpointing()
        assert relative(gradients(attacker, groups)[1], expected) < 1e-5


def test_loss_is_the_mean_over_samples_and_trained_steps(base_config, load):
    """Against the equation of MATH.md section 3, formed with plain autograd from the velocities."""
    attacker = load(replace(base_config, lora=LORA, beta=0.5, clip=0.2), seed=1)
    groups = scored(rollout(attacker, examples(1), seed=0, round=1, step=0))
    metrics, _ = gradients(attacker, groups)
    rewards = torch.tensor([v.reward for v in groups[0].verdicts], dtype=torch.float64)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    items = [Item(groups[0].group.encoding, step, a) for made, a in zip(groups[0].group.samples, advantages) for step in made.steps]
    now = replay(attacker, items)
    loss = (-now.advantages + 0.5 * now.kl).mean()  # on-policy: the ratio is one
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["kl_ref"] == pytest.approx(now.kl.mean().item(), rel=1e-4) and metrics["kl_ref"] > 0


def test_the_kls_reference_is_the_base(base_config, load):
    """A fresh adapter adds exactly nothing, so the KL is exactly zero; after it moved, it is not."""
    attacker = load(replace(base_config, lora=LORA, beta=0.5))
    groups = scored(rollout(attacker, examples(1), seed=0, round=1, step=0))
    assert update(attacker, groups)["kl_ref"] == 0
    assert update(attacker, groups)["kl_ref"] > 0


@pytest.mark.parametrize("variant", ["guard", "dppo"])
def test_drift_is_zero_on_policy_and_grows(variant, base_config, load):
    attacker = load(replace(base_config, lora=LORA, variant=variant), seed=1)
    groups = scored(rollout(attacker, examples(1), seed=0, round=1, step=0))
    attacker.config = replace(attacker.config, microbatch=8)
    assert update(attacker, groups)["drift"] < 1e-9
    second = update(attacker, groups)
    assert second["drift"] > 1e-9 and second["logp_mismatch"] == 0  # nothing to compare: the weights have moved


def test_a_nan_reward_leaves_the_rest_of_its_group_trained(base_config, load):
    attacker = load(replace(base_config, lora=LORA), seed=1)
    rolled = rollout(attacker, examples(1), seed=0, round=1, step=0)
    broken = scored(rolled, lambda i, j: math.nan if j == 2 else float(j))
    metrics, found = gradients(attacker, broken)
    assert metrics["samples/quarantined"] == 1 and math.isfinite(metrics["loss"])
    kept = torch.tensor([0.0, 1.0, 3.0])
    advantages = torch.zeros(4)
    advantages[[0, 1, 3]] = (kept - kept.mean()) / (kept.std() + 1e-6)
    items = [Item(rolled[0].encoding, step, a) for made, a in zip(rolled[0].samples, advantages) for step in made.steps]
    now = replay(attacker, items)
    attacker.player.backward(-(now.advantages * (now.logp - now.old_logp)).mean())
    expected = take_gradients(attacker.player)
    assert relative(found, expected) < 1e-5


def test_all_groups_degenerate_is_a_harmless_step(base_config, load):
    attacker = load(replace(base_config, lora=LORA), seed=1)
    before = [p.ds_tensor.clone() for p in attacker.player.trainable]
    metrics = update(attacker, scored(rollout(attacker, examples(1), seed=0, round=1, step=0), lambda i, j: 0.3))
    assert metrics["groups/degenerate"] == metrics["groups"] == 1 and metrics["grad_norm"] == 0
    assert all(torch.equal(old, p.ds_tensor) for old, p in zip(before, attacker.player.trainable))


def test_nothing_to_train_on_is_an_error(base_config, load):
    attacker = load(replace(base_config, dynamics="ode"))
    with pytest.raises(ValueError, match="ode"):
        update(attacker, scored(rollout(attacker, examples(1), seed=0, round=1, step=0)))


def test_default_clip_ranges(base_config):
    wanted = {"flow_sde": 1e-4, "dance": 1e-4, "cps": 1e-5}
    assert {name: clip_range(replace(base_config, dynamics=name)) for name in wanted} == wanted
    assert clip_range(replace(base_config, variant="guard")) == 2e-6 and clip_range(replace(base_config, clip=0.1)) == 0.1


def test_batch_std_is_taken_over_all_groups(base_config, load):
    attacker = load(replace(base_config, lora=LORA, advantage_std="batch"))
    from aot_fast.attacker.flow_grpo import group_advantages

    rewards = torch.tensor([[0.0, 1.0], [4.0, 6.0]], dtype=torch.float64)
    parts = [ScoredGroup(None, tuple(verdict(f"q{i}", r) for r in row)) for i, row in enumerate(rewards.tolist())]
    rows, metrics = group_advantages(attacker, parts)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(correction=0) + 1e-4)
    assert torch.allclose(torch.stack(rows).double(), expected, atol=1e-6)


def test_updates_raise_the_probability_and_the_reward_of_rewarded_edits(base_config, load):
    """Reward = mean of the final latents: a few updates move the log-ratios with the advantages and raise it."""
    config = replace(
        base_config, lora=LORA, clip=0.1, group_size=8, rollout_batch=8, microbatch=16, optimizer=OptimizerConfig(lr=3e-2, weight_decay=0.0)
    )
    attacker = load(config)
    data = examples(1)
    means = []
    for step in range(8):
        groups = rollout(attacker, data, seed=0, round=1, step=step)
        rewards = [float(made.latents.mean()) for made in groups[0].samples]
        means.append(sum(rewards) / len(rewards))
        update(attacker, scored(groups, lambda i, j, rewards=rewards: rewards[j]))
        if step == 0:
            items = [Item(groups[0].encoding, s, torch.ones(())) for made in groups[0].samples for s in made.steps]
            now = replay(attacker, items)
            ratio = (now.logp - now.old_logp).detach().view(8, -1).mean(1)
            assert float((ratio * (torch.tensor(rewards) - means[0])).sum()) > 0
            attacker.player.engine.optimizer.zero_grad()
    assert sum(means[-2:]) / 2 > sum(means[:2]) / 2 + 0.05  # seeds 0 to 3 gave 0.13 to 0.19


def test_rollout_is_seeded_by_the_question_not_its_place(base_config, load):
    attacker = load(base_config)
    data = examples()
    first = rollout(attacker, data, seed=3, round=1, step=5)
    other = rollout(attacker, data[::-1], seed=3, round=1, step=5)
    later = rollout(attacker, data[:1], seed=3, round=1, step=6)
    assert [e.seed for e in first[0].edits] == [e.seed for e in other[1].edits] != [e.seed for e in later[0].edits]
    for one, two in zip(first[0].samples, other[1].samples):
        assert (one.latents - two.latents).abs().max() < 1e-5


def test_frozen_rollout_is_plain_ode_with_noise_of_its_own(base_config, load):
    group = rollout(load(base_config), examples(1), seed=0, round=1, step=0, group_size=2, train=False)[0]
    assert len(group.edits) == 2 and all(made.steps == () for made in group.samples)
    assert not torch.equal(group.samples[0].latents, group.samples[1].latents)
    assert group.edits[0].image.size == (64, 64) and group.edits[0].attacker_round == 1


def test_collect_scores_every_edit(base_config, load):
    def answerer(asked, trials, temperature, seeds):
        return [[Answer("B", "B", False)] * trials for _ in asked]

    groups = judged(rollout(load(base_config), examples(), seed=0, round=1, step=0), RewardConfig(q_low=-1.0, q_high=-0.9), answerer, None)
    assert [[v.reward for v in part.verdicts] for part in groups] == [[1.0] * 4] * 2


def test_replay_batches_hold_equal_shapes_only(base_config, load):
    attacker = load(base_config)
    groups = rollout(attacker, examples(), seed=0, round=1, step=0)
    items = [Item(group.encoding, group.samples[j].steps[k], torch.ones(())) for j in range(4) for k in range(2) for group in groups]
    made = replay_batches(attacker, items)
    assert all(len({tuple(item.encoding.shapes) for item in batch}) == 1 and len(batch) <= 4 for batch in made)
    assert sum(map(len, made)) == len(items)


NUM_UPDATES = 20
OTHER_WAYS = {"beta": 0.1, "dynamics": "cps", "variant": "guard", "guidance": 2.0}


def train(backend, attacker, recorded):
    """Rows of metrics and whole parameters after NUM_UPDATES updates on one recorded rollout."""
    from deepspeed.utils import safe_get_full_fp32_param

    with K.backend(backend):
        rows = [update(attacker, recorded) for _ in range(NUM_UPDATES)]
    named = attacker.player.module.named_parameters()
    return rows, {name: safe_get_full_fp32_param(p).clone() for name, p in named if p.requires_grad}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the fused path on this machine's CPU: needs Triton's interpreter")
@pytest.mark.parametrize("changes", [{"clip": 1e-3}, OTHER_WAYS | {"clip": 1e-3}], ids=["flow-grpo", "guard-cps-kl-guidance"])
def test_twenty_updates_in_triton_are_the_plain_ones(changes, base_config, load):
    """fp32 sums in another order differ by under 1e-6 an update; twenty updates add up to under 1e-5.

    So on a GPU too, in fp32 without TF32; that has not been run.
    """
    config = replace(base_config, lora=LORA, optimizer=OptimizerConfig(lr=3e-3, eps=1e-4), **changes)
    recorded = scored(rollout(load(config, seed=1), examples(1), seed=0, round=1, step=0))
    plain, expected = train("reference", load(config, seed=1), recorded)
    rows, parameters = train("triton", load(config, seed=1), recorded)
    for row, wanted in zip(rows, plain, strict=True):
        assert row.keys() == wanted.keys() and row["applied"] == 1
        for name in row.keys() - {"lr"}:
            assert row[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-5), name
    worst = max((float((parameters[n] - expected[n]).norm() / expected[n].norm()), n) for n in expected)
    assert rows[-1]["clip"] > 0  # the policy has moved
    assert worst[0] <= 1e-5, worst
