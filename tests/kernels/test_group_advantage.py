"""group_advantage against the oracle: exact zero variance, large offsets, non-finite rewards, ragged groups."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aot_fast.kernels as K

from . import oracle

pytestmark = pytest.mark.usefixtures("each_backend")


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.lists(st.sampled_from((0.0, 0.2, 0.8, 1.0, -3.5, 1e4, 1e4 + 1, math.nan, math.inf)), max_size=6), max_size=5),
    std=st.sampled_from(("group", "batch", "none")),
    ddof=st.sampled_from((0, 1)),
    eps=st.sampled_from((1e-6, 1e-4)),
)
def test_ragged_groups_match_the_oracle(groups, std, ddof, eps):
    rewards = torch.tensor([r for group in groups for r in group], dtype=torch.float32)
    sizes = [len(group) for group in groups]
    out = K.group_advantage(rewards, sizes, eps=eps, std=std, ddof=ddof)
    values, degenerate = oracle.group_advantage(rewards.tolist(), sizes, eps, std, ddof)
    assert out.values.dtype == torch.float32 and out.degenerate.tolist() == degenerate
    # fp64 inside, one rounding to fp32 at the end
    torch.testing.assert_close(out.values.double(), torch.tensor(values, dtype=torch.float64), rtol=2**-23, atol=1e-12)
    assert out.num_nonfinite.item() == (~torch.isfinite(rewards)).sum().item()


@pytest.mark.parametrize("std", ("group", "batch", "none"))
def test_equal_rewards_give_exactly_zero_and_are_flagged(std):
    # 0.8 has no exact mean in fp32: (R - mean) / eps would be a false advantage
    out = K.group_advantage(torch.tensor([0.8] * 7 + [0.0, 1.0] + [0.3]), torch.tensor([7, 2, 1]), std=std)
    assert out.degenerate.tolist() == [True, False, True]
    assert (out.values[:7] == 0).all() and out.values[9] == 0 and (out.values[7:9] != 0).all()


def test_a_large_offset_does_not_change_the_advantages():
    bits = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert torch.equal(K.group_advantage(1e4 + bits, [7]).values, K.group_advantage(bits, [7]).values)


def test_a_non_finite_reward_leaves_the_statistics():
    out = K.group_advantage(torch.tensor([0.0, math.nan, 1.0, 2.0, math.inf, -math.inf, 5.0]), [5, 2])
    assert torch.equal(out.values[[0, 2, 3]], K.group_advantage(torch.tensor([0.0, 1.0, 2.0]), [3]).values)
    assert (out.values[[1, 4, 5, 6]] == 0).all() and out.degenerate.tolist() == [False, True] and out.num_nonfinite == 3


def test_ddof_and_eps_and_the_batch_deviation():
    rewards = torch.tensor([0.0, 1.0, 0.0, 3.0])
    assert K.group_advantage(rewards, [2, 2]).values.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5] * 2, abs=2e-6)
    assert K.group_advantage(rewards, [2, 2], ddof=0, eps=0.0).values.tolist() == [-1.0, 1.0, -1.0, 1.0]
    batch = K.group_advantage(rewards, [2, 2], std="batch", ddof=0, eps=1e-4).values
    assert batch.tolist() == pytest.approx([r / (1.5**0.5 + 1e-4) for r in (-0.5, 0.5, -1.5, 1.5)], rel=1e-6)
    assert K.group_advantage(rewards, [2, 2], std="none").values.tolist() == [-0.5, 0.5, -1.5, 1.5]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.sampled_from((0, 1, 2, 31, 32, 33, 70)), min_size=1, max_size=4),  # around one tile of a group, and three tiles
    std=st.sampled_from(("group", "batch", "none")),
    offset=st.sampled_from((0.0, 1e4)),
    holes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_large_groups_match_the_reference(sizes, std, offset, holes, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = offset + torch.randn(sum(sizes), generator=generator)
    if holes:
        rewards[::5] = math.nan
    out = K.group_advantage(rewards, sizes, std=std)
    with K.backend("reference"):
        expected = K.group_advantage(rewards, sizes, std=std)
    torch.testing.assert_close(out.values, expected.values, rtol=2**-23, atol=1e-12)
    assert torch.equal(out.degenerate, expected.degenerate) and out.num_nonfinite == expected.num_nonfinite


def test_more_groups_than_a_block_match_the_reference():
    sizes = [1] * 258 + [40, 0, 3]  # more groups, and more rewards, than the 256 that one program surveys
    rewards = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
    rewards[:3] = math.inf
    out = K.group_advantage(rewards, sizes, std="batch")
    with K.backend("reference"):
        expected = K.group_advantage(rewards, sizes, std="batch")
    torch.testing.assert_close(out.values, expected.values, rtol=2**-23, atol=1e-12)
    assert torch.equal(out.degenerate, expected.degenerate) and out.num_nonfinite == 3


@pytest.mark.parametrize("std", ("group", "batch", "none"))
def test_two_runs_have_the_same_bits(std):
    rewards = 1e3 + torch.randn(70, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(*(K.group_advantage(rewards, [40, 9, 21], std=std) for _ in range(2))))


def test_strided_rewards_and_expanded_sizes():
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([4]).expand(3)
    out = K.group_advantage(rewards[::2], sizes)
    assert torch.equal(out.values, K.group_advantage(rewards[::2].contiguous(), [4, 4, 4]).values)


@pytest.mark.parametrize("std", ("group", "batch"))
def test_the_registered_operator_keeps_its_promises(operators, std):
    rewards, sizes = torch.randn(5), torch.tensor([3, 2])
    torch.library.opcheck(operators.group_advantage.default, (rewards, sizes, 1e-6, std, 1))
    compiled = torch.compile(K.group_advantage, fullgraph=True, backend="aot_eager")(rewards, sizes, std=std)
    assert torch.equal(compiled.values, K.group_advantage(rewards, sizes, std=std).values)


def test_no_rewards():
    assert K.group_advantage(torch.zeros(0), []).values.shape == (0,)


def test_errors_name_what_was_given_and_what_was_expected():
    rewards = torch.zeros(4)
    cases = (
        (
            lambda: K.group_advantage(rewards, torch.tensor([2, 3], device="cpu")),  # sizes on a GPU are not read
            r"group_sizes: given \[2, 3\], expected sizes that add up to 4",
        ),
        (lambda: K.group_advantage(rewards, [1, 2**63 - 1, 2**63 - 1, 5]), "group_sizes: given"),  # whose sum wraps around to 4
        (lambda: K.group_advantage(rewards, [2, 2], std="mean"), "std: given 'mean', expected one of"),
        (lambda: K.group_advantage(rewards, [2, 2], ddof=2), "ddof: given 2, expected 0 or 1"),
        (lambda: K.group_advantage(rewards.long(), [4]), "rewards: given torch.int64"),
        (lambda: K.group_advantage(rewards, torch.tensor([2.0, 2.0])), "group_sizes: given torch.float32"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
