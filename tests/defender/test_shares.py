"""Groups over ranks and micro-batches: nothing lost, nothing twice, even loads, full batches."""

import pytest

from aot_fast.defender.shares import Part, balanced, filled


def part(group, prompt, *lengths, first=0):
    return Part(group, prompt, tuple(range(first, first + len(lengths))), lengths)


GROUPS = [part(i, 100 + 10 * i, *(5 + j for j in range(8)), first=8 * i) for i in range(5)]


def numbers(parts):
    return sorted(n for p in parts for n in p.responses)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])  # 7: more ranks than groups
def test_every_response_is_on_one_rank_and_loads_are_even(num_ranks):
    ranks = balanced(GROUPS, num_ranks)
    assert numbers([p for rank in ranks for p in rank]) == list(range(40))
    loads = [sum(p.tokens for p in rank) for rank in ranks]
    # Largest first to the emptiest: no rank is further from another than the largest part.
    assert max(loads) - min(loads) <= max(p.tokens for p in GROUPS)


def test_a_group_is_cut_only_where_a_rank_would_have_none():
    assert sorted(p.group for rank in balanced(GROUPS, 4) for p in rank) == [0, 1, 2, 3, 4]
    assert [len(rank) for rank in balanced(GROUPS[:1], 3)] == [1, 1, 1]
    assert [len(rank) for rank in balanced([part(0, 9, 4)], 3)] == [1, 0, 0]


# 1: a response each; 130: a prompt with a few; 131 to 400: groups begin and end in the middle of a batch.
@pytest.mark.parametrize("budget", [1, 130, 131, 200, 333, 400, 10_000])
def test_batches_hold_every_response_once_within_the_budget(budget):
    batches = filled(GROUPS, budget)
    assert [n for batch in batches for p in batch for n in p.responses] == list(range(40))
    assert all(p.lengths and p.prompt_tokens == GROUPS[p.group].prompt_tokens for batch in batches for p in batch)
    for batch in batches:
        assert sum(p.tokens for p in batch) <= budget or sum(len(p.responses) for p in batch) == 1
    sizes = [sum(p.tokens for p in batch) for batch in batches]
    if budget == 10_000:
        assert len(batches) == 1 and sizes[0] == sum(p.tokens for p in GROUPS)


def test_no_parts_make_no_batches():
    assert filled([], 100) == [] and balanced([], 2) == [[], []]
