"""The Defender's update against MATH.md in fp64, and its independence of batching and of the number of ranks."""

import json
import math
from dataclasses import replace

import pytest
import torch

from aot_fast.config import EngineConfig, LoraConfig, OptimizerConfig
from aot_fast.defender import dapo
from aot_fast.defender.model import load_defender, load_frozen
from aot_fast.defender.packing import Row, batch_of, response_logits
from aot_fast.defender.prompt import encode
from aot_fast.defender.prompts import Prompts
from aot_fast.engine import whole_state
from tests.defender.recorded import NUM_EXAMPLES, REWARDS, distance, gradient_of_update, recorded_groups, reference_gradient
from tests.models import defender_config_of, scene_examples

# fp32 sums in another order differ by about sqrt(terms) * 2^-24: below 1e-6 for the longest (1e3 to 1e4 terms), times a few layers.
TOLERANCE = 1e-5


def oracle(folder, runtime, groups, clip_low=0.2, clip_high=0.28, dual_clip=3.0):
    """(loss, gradients) of DAPO in fp64: one response at a time, no padding, straight from MATH.md section 2."""
    defender = load_frozen(folder, defender_config_of(folder), runtime)
    model = defender.model.double().requires_grad_(True)
    num_tokens = sum(len(r.ids) for g in groups for r in g.responses)
    total = torch.zeros((), dtype=torch.float64)
    for group, example in ((g, scene_examples(NUM_EXAMPLES)[g.example]) for g in groups):
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        prompt = encode(defender, example)
        for response, advantage in zip(group.responses, advantages):
            ids = torch.cat([prompt.ids, response.ids])
            more = prompt.next_position + torch.arange(len(response.ids))
            positions = torch.cat([prompt.positions, more.expand(3, -1)], 1)[:, None]
            logits = model(
                input_ids=ids[None], position_ids=positions, pixel_values=prompt.pixels.double(), image_grid_thw=prompt.grid
            ).logits
            start = len(prompt.ids) - 1
            logp = torch.log_softmax(logits[0, start:-1], -1).gather(-1, response.ids[:, None])[:, 0]
            old = logp.detach() if group.version == 0 else response.logp.double()
            ratio = torch.exp((logp - old).clamp(-20, 20))
            utility = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
            if advantage < 0:
                utility = torch.maximum(utility, dual_clip * advantage)
            total = total - utility.sum() / num_tokens
    total.backward()
    return total.item(), {name: p.grad.float() for name, p in model.named_parameters()}


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("version", [0, -1], ids=["on_policy", "off_policy"])
def test_update_equals_the_equations_in_fp64(defender_folder, runtime, version, shared_prefix):
    metrics, gradients = gradient_of_update(defender_folder, 0, runtime, version, microbatch=3, shared_prefix=shared_prefix)
    groups = recorded_groups(defender_folder, runtime, version)
    loss, expected = oracle(defender_folder, runtime, groups)
    assert metrics["loss"] == pytest.approx(loss, abs=TOLERANCE)
    if version < 0:
        assert metrics["clip_low"] > 0 and metrics["clip_high"] > 0  # the test reaches both clips
    # Against fp64 the error is that of the whole fp32 network, not of the order of sums.
    assert distance(gradients, expected) < 1e-4


# Padded: one row at a time, ragged and whole batches. Shared: 1 token, so that every response is a batch with its prompt; 240, where groups
# are cut in two (a prompt has some 100 tokens); all in one row. Weights gathered around every module, or whole for the update.
PLAIN = [{"shared_prefix": False, "microbatch": n} for n in (1, 2, 4, 12)]
SHARED = [{"tokens_per_microbatch": 1}, {"tokens_per_microbatch": 240, "gather": "rollout"}, {"tokens_per_microbatch": 10_000}]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("changes", PLAIN + SHARED)
def test_gradient_does_not_depend_on_batches_or_order(defender_folder, runtime, changes, order):
    reference, expected = reference_gradient(defender_folder, runtime)
    metrics, gradients = gradient_of_update(defender_folder, order, runtime, version=-1, **changes)
    assert metrics["loss"] == pytest.approx(reference["loss"], abs=TOLERANCE)
    assert distance(gradients, expected) < TOLERANCE


@pytest.mark.parametrize("prompts", ["mixed", "text"])
@pytest.mark.parametrize(
    "changes",
    [{"shared_prefix": False, "microbatch": 1}, *SHARED, {"gradient_checkpointing": True}, {"attention": "eager"}],
)
def test_several_pictures_or_none_give_the_same_gradient(defender_folder, runtime, prompts, changes):
    reference, expected = reference_gradient(defender_folder, runtime, prompts)
    metrics, gradients = gradient_of_update(defender_folder, 0, runtime, version=-1, prompts=prompts, **changes)
    assert metrics["loss"] == pytest.approx(reference["loss"], abs=TOLERANCE)
    assert distance(gradients, expected) < TOLERANCE
    assert prompts != "text" or not any(g.any() for name, g in gradients.items() if "visual." in name)


def test_offloaded_states_train_the_same(defender_folder, runtime):
    """Three updates; eps: the gradient of the key biases is nothing but rounding, and Adam would make steps of it."""
    trained = []
    for offload in ("none", "optimizer", "all"):
        config = defender_config_of(defender_folder, optimizer=OptimizerConfig(lr=1e-3, eps=1e-4), tokens_per_microbatch=240)
        defender = load_defender(config, EngineConfig(timeout_s=60, offload=offload), runtime)
        for _ in range(3):
            groups = recorded_groups(defender_folder, runtime, version=-1)
            metrics = dapo.update(defender, Prompts(defender, scene_examples(NUM_EXAMPLES)), groups)
        trained.append((metrics["grad_norm"], whole_state(defender.player)))
    for norm, state in trained[1:]:
        assert norm == pytest.approx(trained[0][0], rel=TOLERANCE)
        assert distance(state, trained[0][1]) < TOLERANCE


def test_the_vision_tower_has_its_own_rate(defender_folder, runtime):
    moved = {}
    for vision_lr in (0.0, 1e-30):
        config = defender_config_of(defender_folder, optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0), vision_lr=vision_lr)
        defender = load_defender(config, EngineConfig(timeout_s=60), runtime)
        before = whole_state(defender.player)
        dapo.update(defender, Prompts(defender, scene_examples(NUM_EXAMPLES)), recorded_groups(defender_folder, runtime))
        moved[vision_lr] = {name: float((x - before[name]).abs().max()) > 1e-20 for name, x in whole_state(defender.player).items()}
    assert any(yes for name, yes in moved[0.0].items() if "visual." in name)
    assert moved[1e-30] == {name: yes and "visual." not in name for name, yes in moved[0.0].items()}


# 5 rows: the last of a rank's two micro-batches has one row. 240 tokens: ranks have unequally many micro-batches.
@pytest.mark.parametrize(
    "changes",
    [
        {"shared_prefix": False, "microbatch": 5, "gather": "rollout"},
        {"tokens_per_microbatch": 240},
        {"prompts": "mixed", "gradient_checkpointing": True},  # a rank may have text only
    ],
)
def test_gradient_on_two_ranks_equals_one(defender_folder, runtime, torchrun, tmp_path, changes):
    torchrun(2, "-m", "tests.defender.recorded", str(defender_folder), "0", str(tmp_path / "two.pt"), json.dumps(changes))
    metrics, gradients = torch.load(tmp_path / "two.pt", weights_only=True)
    reference, expected = reference_gradient(defender_folder, runtime, changes.get("prompts", "scenes"))
    assert metrics["loss"] == pytest.approx(reference["loss"], abs=TOLERANCE)
    assert metrics["grad_norm"] == pytest.approx(reference["grad_norm"], rel=TOLERANCE)
    assert distance(gradients, expected) < TOLERANCE


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_trainer_logp_equals_rollout_logp(defender_folder, runtime, shared_prefix):
    metrics, _ = gradient_of_update(defender_folder, 0, runtime, version=0, microbatch=4, shared_prefix=shared_prefix)
    assert metrics["logp_mismatch"] <= 1e-5
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6) and metrics["ratio_deviation"] == 0


def test_non_finite_reward_leaves_its_group_alive(defender_folder, runtime):
    groups = recorded_groups(defender_folder, runtime)
    bad = groups[0]
    groups[0] = type(bad)(**{**vars(bad), "rewards": (math.nan, 1.0, 0.0, 0.8)})
    defender = load_defender(defender_config_of(defender_folder), EngineConfig(timeout_s=60), runtime)
    metrics = dapo.update(defender, Prompts(defender, scene_examples(NUM_EXAMPLES)), groups)
    assert metrics["applied"] == 1 and math.isfinite(metrics["grad_norm"]) and metrics["groups/degenerate"] == 0


def test_equal_rewards_give_no_gradient(defender_folder, runtime):
    groups = [type(g)(**{**vars(g), "rewards": (0.8,) * 4}) for g in recorded_groups(defender_folder, runtime)]
    defender = load_defender(defender_config_of(defender_folder), EngineConfig(timeout_s=60), runtime)
    metrics = dapo.update(defender, Prompts(defender, scene_examples(NUM_EXAMPLES)), groups)
    assert metrics["groups/degenerate"] == len(REWARDS) and metrics["grad_norm"] == 0


@pytest.mark.parametrize("changes", [{}, {"loss": "gspo"}, {"agg": "seq_mean"}, {"agg": "seq_sum_norm"}, {"mask_truncated": True}])
def test_leaving_out_what_has_no_gradient_changes_nothing(defender_folder, runtime, changes, monkeypatch):
    """A group of equal rewards, and one with a reward that is no number; normalisers are those of all responses."""
    groups = recorded_groups(defender_folder, runtime, version=-1)
    groups[1] = replace(groups[1], rewards=(0.8,) * 4)
    groups[2] = replace(groups[2], rewards=(math.nan, 1.0, 0.0, 0.8))
    made = []
    for everything in (False, True):
        if everything:
            monkeypatch.setattr(dapo, "trained_on", lambda defender, groups, advantages: [True] * len(advantages))
        if everything and "mask_truncated" in changes:  # without them being left out nothing keeps them from the loss
            break
        defender = load_defender(defender_config_of(defender_folder, **changes), EngineConfig(timeout_s=60), runtime)
        made.append(dapo.update(defender, Prompts(defender, scene_examples(NUM_EXAMPLES)), groups))
    assert made[0]["rows/dropped"] >= 5 and made[0]["applied"] == 1
    for wanted in made[1:]:
        assert made[0]["loss"] == pytest.approx(wanted["loss"], abs=TOLERANCE)
        assert made[0]["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=TOLERANCE) and wanted["rows/dropped"] == 0


def test_no_groups_skip_the_step(defender_folder, runtime):
    defender = load_defender(defender_config_of(defender_folder), EngineConfig(timeout_s=60), runtime)
    assert dapo.update(defender, Prompts(defender, scene_examples(NUM_EXAMPLES)), []) == {"skipped": 1.0}
    assert defender.version == 0


def test_swapping_the_picture_changes_the_logp(defender_folder, runtime):
    defender = load_frozen(defender_folder, defender_config_of(defender_folder), runtime)
    examples, groups = scene_examples(NUM_EXAMPLES), recorded_groups(defender_folder, runtime)
    logits = []
    for picture in (examples[0].image, examples[1].image):
        example = type(examples[0])(examples[0].question, picture)
        response = groups[0].responses[1]
        row = Row(encode(defender, example), response.ids, response.logp, torch.ones_like(response.logp), 0)
        logits.append(response_logits(defender.model, batch_of(defender, [row])))
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_kl_to_the_base_is_zero_before_training_and_grows_with_it(defender_folder, runtime):
    config = defender_config_of(defender_folder, lora=LoraConfig(rank=4, alpha=8), beta=0.1)
    defender = load_defender(config, EngineConfig(timeout_s=60), runtime)
    examples, groups = scene_examples(NUM_EXAMPLES), recorded_groups(defender_folder, runtime)
    assert dapo.update(defender, Prompts(defender, examples), groups)["kl_ref"] == 0
    assert dapo.update(defender, Prompts(defender, examples), groups)["kl_ref"] > 0


@pytest.mark.parametrize(
    "changes", [{"loss": "gspo"}, {"loss": "cispo"}, {"agg": "seq_mean"}, {"agg": "seq_sum_norm"}, {"entropy_coef": 0.01}]
)
def test_variants_do_not_depend_on_the_microbatch(defender_folder, runtime, changes):
    plain = {"shared_prefix": False, "microbatch": 12}
    reference, expected = gradient_of_update(defender_folder, 0, runtime, version=-1, **plain, **changes)
    metrics, gradients = gradient_of_update(defender_folder, 1, runtime, version=-1, tokens_per_microbatch=240, **changes)
    assert metrics["loss"] == pytest.approx(reference["loss"], abs=TOLERANCE)
    assert distance(gradients, expected) < TOLERANCE
