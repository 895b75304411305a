"""The engine: the finite-checked step, equal work on all ranks, generation inside ZeRO-3, resume."""

import pytest
import torch
from torch import nn

from aot_fast.config import EngineConfig, OptimizerConfig
from aot_fast.engine import TooManyBadSteps, build_player, microbatches, seed_of, whole_state

ENGINE = EngineConfig(timeout_s=60, persistence_threshold=0, max_bad_steps=3)


def toy(runtime, **optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    settings = {"lr": 1e-2, "max_grad_norm": 1e9, "weight_decay": 0.0} | optimizer
    return build_player("toy", model, OptimizerConfig(**settings), ENGINE, runtime)


def step(player, x, poison=False, healthy=True):
    loss = player(x).square().sum() / len(x)
    player.backward(loss * torch.nan if poison else loss)
    return player.step(healthy)


X = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))


def test_step_equals_plain_adamw(runtime):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    player = toy(runtime)
    for _ in range(3):
        optimizer.zero_grad()
        (plain(X).square().sum() / len(X)).backward()
        optimizer.step()
        assert step(player, X).applied
    ours = whole_state(player)
    assert all(torch.allclose(ours[name], value, atol=1e-6) for name, value in plain.state_dict().items())


@pytest.mark.parametrize("bad", [{"poison": True}, {"healthy": False}])
def test_non_finite_step_leaves_weights_bit_identical_and_the_next_is_clean(runtime, bad):
    player, control = toy(runtime), toy(runtime)
    before = whole_state(player)
    result = step(player, X, **bad)
    assert not result.applied and player.version == 0
    assert all(torch.equal(value, before[name]) for name, value in whole_state(player).items())
    step(player, X)
    step(control, X)
    after, expected = whole_state(player), whole_state(control)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_repeated_bad_steps_end_the_run(runtime):
    player = toy(runtime)
    for _ in range(2):
        step(player, X, poison=True)
    with pytest.raises(TooManyBadSteps, match="toy.optimizer.lr"):
        step(player, X, poison=True)


def test_parameter_unused_in_a_step_does_not_keep_an_old_gradient(runtime):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x, both):
            return self.a(x).sum() + (self.b(x).sum() if both else 0.0)

    player = build_player("heads", TwoHeads(), OptimizerConfig(lr=1e-2, betas=(0.0, 0.0), weight_decay=0.0), ENGINE, runtime)
    player.backward(player(torch.ones(1, 4), True))
    player.step()
    before = whole_state(player)
    player.backward(player(torch.ones(1, 4), False))
    player.step()
    after = whole_state(player)
    assert torch.equal(after["b.weight"], before["b.weight"]) and not torch.equal(after["a.weight"], before["a.weight"])


def test_resume_is_bitwise(runtime, tmp_path):
    player = toy(runtime)
    step(player, X)
    player.save(tmp_path)
    step(player, X)
    expected = whole_state(player)
    again = toy(runtime)
    again.load(tmp_path)
    assert again.version == 1
    step(again, X)
    assert all(torch.equal(value, expected[name]) for name, value in whole_state(again).items())


def test_gathered_weights_are_whole_and_training_goes_on_after(runtime):
    player = toy(runtime)
    with player.gathered() as model:
        first = model(X)
        assert torch.equal(model(X), first) and not first.requires_grad
    assert step(player, X).applied


def test_one_rank_works_with_its_partitions_and_no_second_copy(runtime):
    """What makes a 41 GB model fit a card of 80 GB: while sampling, and while training."""

    def same(module):
        return all(p.data_ptr() == p.ds_tensor.data_ptr() for p in module.parameters(recurse=False))

    player, seen = toy(runtime), []
    with player.gathered() as module:
        assert all(same(part) for part in module)
    for part in player.module:
        part.register_forward_pre_hook(lambda part, _: seen.append(same(part)))
    step(player, X)
    assert seen == [True] * 3


def test_learning_rate_warms_up_and_is_not_advanced_by_a_skipped_step(runtime):
    player = toy(runtime, warmup_steps=4)
    rates = [step(player, X, poison=k == 1).lr for k in range(4)]
    assert rates == pytest.approx([0.0025, 0.005, 0.005, 0.0075])


def test_microbatches_of_one_rank_cover_all_items(runtime):
    assert microbatches(runtime, list(range(5)), 2) == [[0, 1], [2, 3], [4]]


def test_seeds_differ_by_every_part_and_fit_63_bits():
    seeds = {seed_of(0, "a", 1), seed_of(0, "a", 2), seed_of(0, "b", 1), seed_of(1, "a", 1), seed_of(0, "a", "1", "")}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)


def test_ranks_may_answer_unequally_often_between_steps(torchrun):
    assert torchrun(2, "-m", "tests.unequal_forwards", timeout_s=90).count("done") == 2
