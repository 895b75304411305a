"""decode_attention against attention over the joined keys in fp64."""

import pytest
import torch

import aot_fast.kernels as K
from tests.kernels.conftest import INTERPRETED

SIZES = {  # S rows, A, K heads, D, Q places, P room, G, R room
    "ragged": (6, 4, 2, 32, 3, 70, 3, 9),
    "odd": (5, 6, 1, 24, 2, 300, 4, 70),
    "more_queries_than_a_tile": (40, 8, 2, 16, 2, 130, 40, 3),
    "one": (1, 2, 2, 16, 1, 1, 1, 1),
    "splits_beyond_the_end": (3, 2, 1, 16, 2, 1100, 2, 4),
}


def case(name, device="cpu", dtype=torch.float32, seed=0):
    rows, heads, kv_heads, dim, places, room, group, own_room = SIZES[name]
    made = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=made, dtype=torch.float64).to(dtype)

    q, k, v = normal(rows, heads, dim), normal(rows, kv_heads, dim), normal(rows, kv_heads, dim)
    prompts, own = normal(2, places, kv_heads, room, dim), normal(2, rows, kv_heads, own_room, dim)
    lengths = torch.randint(1, room + 1, (places,), generator=made, dtype=torch.int32)
    lengths[0] = 5 if name == "splits_beyond_the_end" else room
    sitting = torch.randperm(rows, generator=made)[: max(1, rows - 1)].int()  # one row is no member
    members = torch.full((places * group,), -1, dtype=torch.int32)
    members[torch.randperm(places * group, generator=made)[: len(sitting)]] = sitting
    steps = torch.randint(0, own_room, (rows,), generator=made, dtype=torch.int32)
    steps[int(sitting[0])] = 0
    return [x.to(device) for x in (q, k, v, prompts, own, lengths, members.view(places, group), steps)]


def by_definition(q, k, v, prompts, own, lengths, members, steps, scale):
    """Each row by itself, over its keys put one behind the other; fp64."""
    out, own = torch.zeros_like(q, dtype=torch.float64), own.clone()
    for place, slots in enumerate(members.tolist()):
        for slot in slots:
            if slot < 0:
                continue
            own[:, slot, :, steps[slot]] = torch.stack([k[slot], v[slot]])
            for head in range(q.shape[1]):
                kv_head = head // (q.shape[1] // k.shape[1])
                keys, values = (
                    torch.cat([prompts[i, place, kv_head, : lengths[place]], own[i, slot, kv_head, : steps[slot] + 1]]).double()
                    for i in (0, 1)
                )
                out[slot, head] = torch.softmax(keys @ q[slot, head].double() * scale, 0) @ values
    return out, own


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_attention_over_the_joined_keys(name, dtype, device):
    if dtype is torch.bfloat16 and device == "cpu" and K.backend_in_force() == "triton":
        pytest.skip("the interpreter knows no bf16")
    given = case(name, device, dtype)
    expected, expected_own = by_definition(*(x.cpu() for x in given), 0.3)
    got = K.decode_attention(*given, scale=0.3)
    # fp32: sums of some thousand terms. bf16: weights and result are rounded, 2^-9 each, of values around 1.
    assert (got.cpu().double() - expected).abs().max() < (1e-5 if dtype is torch.float32 else 2**-6)
    assert got.dtype is dtype and torch.equal(given[4].cpu(), expected_own)


def test_two_calls_have_the_same_bits(device):
    given = case("ragged", device)
    assert torch.equal(K.decode_attention(*given, scale=0.3), K.decode_attention(*given, scale=0.3))


def test_values_beyond_the_lengths_count_for_nothing(device):
    q, k, v, prompts, own, lengths, members, steps = case("odd", device)
    expected = K.decode_attention(q, k, v, prompts, own.clone(), lengths, members, steps, scale=0.3)
    for place, length in enumerate(lengths.tolist()):
        prompts[:, place, :, length:] = torch.nan
    for row, step in enumerate(steps.tolist()):
        own[:, row, :, step:] = torch.nan
    assert torch.equal(K.decode_attention(q, k, v, prompts, own, lengths, members, steps, scale=0.3), expected)


def test_wrong_arguments_are_named():
    q, k, v, prompts, own, lengths, members, steps = case("ragged")
    for change, name in (
        ({"k": k[:, :, :5]}, "k"),
        ({"prompts": prompts[:1]}, "prompts"),
        ({"own": own.double()}, "own"),
        ({"lengths": lengths.long()}, "lengths"),
        ({"members": members[:1]}, "members"),
        ({"own": own.transpose(3, 4).contiguous().transpose(3, 4)}, "own"),
    ):
        arguments = dict(q=q, k=k, v=v, prompts=prompts, own=own, lengths=lengths, members=members, steps=steps) | change
        with pytest.raises(ValueError, match=name):
            K.decode_attention(**arguments, scale=1.0)


@pytest.mark.skipif(not INTERPRETED, reason="checked on a CPU, under the interpreter")
def test_the_operator_is_registered_as_torch_wants_it():
    from aot_fast.kernels import decode_attention_triton  # noqa: F401

    torch.library.opcheck(torch.ops.aot_fast.decode_attention.default, (*case("ragged"), 0.3))
