"""What the log says a step cost is what its answers cost."""

import pytest

from aot_fast.config import EngineConfig
from aot_fast.defender import dapo, flops
from aot_fast.defender.groups import Stream, collect
from aot_fast.defender.model import load_defender
from aot_fast.defender.prompts import Prompts
from tests.models import defender_config_of, scene_examples


@pytest.fixture(scope="module")
def step(defender_folder, runtime):
    """(config of the model, metrics of rollout and update, groups), all groups trained on."""
    config = defender_config_of(defender_folder, reward=f"{__name__}:by_length", prompts_per_try=6)
    defender = load_defender(config, EngineConfig(timeout_s=60), runtime)
    prompts = Prompts(defender, scene_examples(6))
    collected = collect(defender, prompts, Stream(7))
    return defender.core.config, collected.metrics | dapo.update(defender, prompts, collected.groups), collected.groups


def by_length(text, question):
    return float(len(text)), len(text) % 2 == 0


def test_operations_are_counted_once_and_nominally(step):
    config, metrics, groups = step
    assert metrics["rows/dropped"] == sum(r == g.rewards[0] for g in groups for r in g.rewards if len(set(g.rewards)) == 1)
    shapes = [flops.GroupShape(((1, 8, 8),), g.prompt_tokens, tuple(len(r.ids) for r in g.responses)) for g in groups]
    assert metrics["update/tflop"] == pytest.approx(flops.update_flops(config, shapes).total / 1e12)
    assert metrics["update/tflop_nominal"] == pytest.approx(flops.update_flops(config, shapes, shared=False).total / 1e12)
    assert metrics["update/tokens"] == sum(g.prompt_tokens + sum(len(r.ids) for r in g.responses) for g in groups)
    assert metrics["update/tokens_nominal"] == sum(g.prompt_tokens + len(r.ids) for g in groups for r in g.responses)


def test_a_rollout_counts_its_answers_whatever_becomes_of_them(step):
    _, metrics, groups = step
    assert metrics["rollout/tokens"] == pytest.approx(metrics["response/tokens"] * 4 * metrics["groups/drawn"])
    assert metrics["rollout/tokens"] > sum(len(r.ids) for g in groups for r in g.responses)
    assert 2 < metrics["rollout/tflop_nominal"] / metrics["rollout/tflop"] < 4  # four answers a prompt
    assert metrics["rollout/tokens_per_s"] * metrics["rollout/seconds"] == pytest.approx(metrics["rollout/tokens"])
    assert metrics["update/seconds"] > 0 and "update/mfu" not in metrics  # nobody knows this CPU's peak
