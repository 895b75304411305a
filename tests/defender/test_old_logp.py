"""Old log-probs: recorded while sampling or recomputed, and the weight for the distance between the two."""

from dataclasses import replace

import pytest
import torch

from aot_fast.config import EngineConfig, OptimizerConfig
from aot_fast.defender import dapo
from aot_fast.defender.groups import Stream
from aot_fast.defender.model import load_defender
from aot_fast.defender.old_logp import with_old_logp
from aot_fast.defender.prompts import Prompts
from aot_fast.defender.shares import correction
from tests.defender.recorded import NUM_EXAMPLES, recorded_groups
from tests.models import defender_config_of, scene_examples


def make(folder, runtime, **changes):
    defender = load_defender(defender_config_of(folder, **({"steps_per_rollout": 2} | changes)), EngineConfig(timeout_s=60), runtime)
    return defender, Prompts(defender, scene_examples(NUM_EXAMPLES))


def off(groups, drift):
    """The groups as if the sampler's log-probs were off by `drift`."""
    return [replace(g, responses=tuple(replace(r, logp=r.logp + drift) for r in g.responses)) for g in groups]


@pytest.mark.parametrize("changes", [{}, {"tokens_per_microbatch": 240}, {"shared_prefix": False}])
def test_recomputed_logps_are_the_trainers(defender_folder, runtime, changes):
    defender, prompts = make(defender_folder, runtime, old_logp="recompute", **changes)
    exact = recorded_groups(defender_folder, runtime)
    made = with_old_logp(defender, prompts, off(exact, 0.3), Stream(0))
    for group, wanted in zip(made, exact, strict=True):
        for r, w in zip(group.responses, wanted.responses, strict=True):
            assert torch.allclose(r.old_logp, w.logp, atol=1e-5) and torch.equal(r.logp, w.logp + 0.3)


def test_groups_of_an_earlier_policy_keep_what_was_recorded(defender_folder, runtime):
    defender, prompts = make(defender_folder, runtime, old_logp="recompute")
    groups = [replace(g, version=-1) for g in recorded_groups(defender_folder, runtime)]
    assert all(r.old_logp is None for g in with_old_logp(defender, prompts, groups, Stream(0)) for r in g.responses)


def test_banked_groups_get_theirs_before_the_policy_moves(defender_folder, runtime):
    """Even where the step's own groups need none: one step a rollout and no weight."""
    defender, prompts = make(defender_folder, runtime, old_logp="recompute", steps_per_rollout=1)
    exact = recorded_groups(defender_folder, runtime)
    stream = Stream(0, bank=off(exact[1:], 0.3))
    given = with_old_logp(defender, prompts, exact[:1], stream)
    assert given == exact[:1] and len(stream.bank) == 2
    for group, wanted in zip(stream.bank, exact[1:], strict=True):
        assert all(torch.allclose(r.old_logp, w.logp, atol=1e-5) for r, w in zip(group.responses, wanted.responses, strict=True))


@pytest.mark.parametrize(("old_logp", "moved"), [("rollout", 0.3), ("recompute", 0.0)])
def test_after_the_policy_has_moved_the_ratio_is_to_the_old_logps(defender_folder, runtime, old_logp, moved):
    """A step of no length moves the version only: the ratio is 1 to the trainer's log-probs, exp(-0.3) to a sampler's that are off."""
    optimizer = OptimizerConfig(lr=1e-30, weight_decay=0.0)
    defender, prompts = make(defender_folder, runtime, old_logp=old_logp, optimizer=optimizer)
    groups = with_old_logp(defender, prompts, off(recorded_groups(defender_folder, runtime), 0.3), Stream(0))
    first = dapo.update(defender, prompts, groups)
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["logp_mismatch"] == pytest.approx(0.3, abs=1e-4)
    second = dapo.update(defender, prompts, groups)
    assert second["ratio"] == pytest.approx(2.718281828**-moved, abs=1e-4)


def test_tokens_are_weighed_by_the_capped_distance(defender_folder, runtime):
    defender, prompts = make(defender_folder, runtime, old_logp="recompute", importance_cap=1.2)
    exact = recorded_groups(defender_folder, runtime)
    for drift, weight in ((0.3, 2.718281828**-0.3), (-0.1, 2.718281828**0.1), (-0.5, 1.2)):
        made = with_old_logp(defender, prompts, off(exact, drift), Stream(0))
        assert correction(defender, made[0].responses[0]) == pytest.approx(torch.full_like(made[0].responses[0].logp, weight), abs=1e-4)
    plain, _ = make(defender_folder, runtime)
    wanted = dapo.update(plain, prompts, exact)
    got = dapo.update(defender, prompts, with_old_logp(defender, prompts, off(exact, 0.3), Stream(0)))
    assert got["grad_norm"] == pytest.approx(wanted["grad_norm"] * 2.718281828**-0.3, rel=1e-4)
