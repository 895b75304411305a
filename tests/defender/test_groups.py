"""Dynamic sampling: bounded, on correctness, with a bank that remembers the policy version."""

import math

import pytest
import torch

from aot_fast.config import EngineConfig
from aot_fast.defender.groups import Group, Stream, collect
from aot_fast.defender.model import load_defender
from aot_fast.defender.prompts import Prompts
from tests.models import defender_config_of, scene_examples


def by_length(text, question):
    """About half of the random model's answers are 'right'."""
    return float(len(text) % 2), bool(len(text) % 2)


def never(text, question):
    return 0.0, False


def broken(text, question):
    raise RuntimeError("the judge is down")


def absent(text, question):
    return None, True


@pytest.fixture(scope="module")
def defender(defender_folder, runtime):
    return load_defender(defender_config_of(defender_folder, max_generation_batches=3), EngineConfig(timeout_s=60), runtime)


def with_settings(defender, monkeypatch, **changes):
    monkeypatch.setattr(defender, "config", type(defender.config)(**{**vars(defender.config), **changes}))


def test_fills_the_batch_with_mixed_groups_only(defender, monkeypatch):
    with_settings(defender, monkeypatch, reward=f"{__name__}:by_length", max_generation_batches=10)
    collected = collect(defender, Prompts(defender, scene_examples(5)), Stream(7))
    assert len(collected.groups) == 3 and all(group.mixed for group in collected.groups)
    assert collected.metrics["groups/short"] == 0


def test_is_bounded_when_no_group_is_mixed(defender, monkeypatch):
    with_settings(defender, monkeypatch, reward=f"{__name__}:never")
    collected = collect(defender, Prompts(defender, scene_examples(5)), Stream(7))
    assert collected.groups == [] and collected.metrics["groups/batches"] == 3 and collected.metrics["groups/short"] == 3


def test_equal_shaped_rewards_with_equal_correctness_are_dropped():
    group = Group(0, "k", (), (0.8, 1.0, 0.8), (True, True, True), 0)
    assert not group.mixed  # the rewards differ, the answers do not


@pytest.mark.parametrize("reward", [broken, absent])
def test_reward_without_a_number_is_counted_and_survives(defender, monkeypatch, reward):
    with_settings(defender, monkeypatch, reward=f"{__name__}:{reward.__name__}", max_generation_batches=1)
    collected = collect(defender, Prompts(defender, scene_examples(3)), Stream(7))
    assert collected.metrics["reward/not_finite"] == 12 and math.isfinite(collected.metrics["reward"])


def test_surplus_is_banked_used_next_and_dropped_when_stale(defender, monkeypatch):
    with_settings(defender, monkeypatch, reward=f"{__name__}:by_length", prompts_per_try=12, prompts_per_step=2)
    stream = Stream(7)
    collect(defender, Prompts(defender, scene_examples(6)), stream)
    banked = len(stream.bank)
    assert banked > 2
    second = collect(defender, Prompts(defender, scene_examples(6)), stream)
    assert second.metrics["groups/banked_used"] == 2 and second.metrics["groups/drawn"] == 0
    monkeypatch.setattr(defender.player, "version", defender.player.version + 2)
    third = collect(defender, Prompts(defender, scene_examples(6)), stream)
    assert third.metrics["groups/stale"] == banked - 2 and third.metrics["groups/banked_used"] == 0


def test_stream_continues_from_its_state(defender, monkeypatch, tmp_path):
    with_settings(defender, monkeypatch, reward=f"{__name__}:by_length", prompts_per_try=4)
    stream = Stream(11)
    collect(defender, Prompts(defender, scene_examples(5)), stream)
    torch.save(stream.state(), tmp_path / "stream.pt")
    again = Stream.restore(torch.load(tmp_path / "stream.pt", weights_only=True))
    one, two = (collect(defender, Prompts(defender, scene_examples(5)), s).groups for s in (stream, again))
    assert [g.key for g in one] == [g.key for g in two]
    assert all(torch.equal(a.logp, b.logp) for g, h in zip(one, two) for a, b in zip(g.responses, h.responses))


def test_every_epoch_draws_every_example_once_in_an_order_of_its_own():
    stream = Stream(3)
    epochs = [[index for _, index in stream.draw(10, 10)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]
    halves = Stream(3)
    assert [i for _, i in halves.draw(4, 10)] + [i for _, i in halves.draw(6, 10)] == epochs[0]
