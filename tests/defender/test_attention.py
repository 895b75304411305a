"""Shared-prompt attention against its definition, a dense mask in fp64."""

import pytest
import torch

from aot_fast.defender.attention import PackedRow, masked_attention

GROUPS = {
    "equal": ((7, (4, 4, 4)),),  # nothing to pad
    "ragged": ((9, (1, 5, 3)), (4, (2, 2)), (6, (3,))),
    "no_responses": ((5, ()), (3, (2, 4))),  # a prompt that is only prefilled, or a stand-in for a picture
    "one_token": ((1, (1, 1)),),
}
HEADS, KEY_HEADS, DIM = 6, 2, 16


def case(groups, dtype, device="cpu", attention="sdpa", dim=DIM, seed=0):
    """(row, q, k, v, gradient); keys are scaled so that the weights are far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(p + sum(r) for p, r in groups)

    def drawn(heads, scale=1.0):
        return (torch.randn(1, heads, num_tokens, dim, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    q, k, v = drawn(HEADS), drawn(KEY_HEADS, 3.0), drawn(KEY_HEADS)
    row = PackedRow(groups, torch.device(device), attention)
    return row, q, k, v, drawn(HEADS).transpose(1, 2)


def outcome(attend, q, k, v, gradient):
    """[output, dq, dk, dv]."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    out.backward(gradient)
    return [out.detach(), *(x.grad for x in inputs)]


def by_definition(row, q, k, v, gradient):
    """The same with the mask written out, token by token, in fp64."""
    num_tokens = q.shape[2]
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    start = 0
    for prompt, responses in row.groups:
        for query in range(start, start + prompt):
            mask[query, start : query + 1] = True
        place = start + prompt
        for n in responses:
            for query in range(place, place + n):
                mask[query, start : start + prompt] = True
                mask[query, place : query + 1] = True
            place += n
        start = place

    def attend(q, k, v):
        k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask.to(q.device), -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    return outcome(attend, *(x.double() for x in (q, k, v, gradient)))


def distance(a, b):
    return max(float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30)) for x, y in zip(a, b, strict=True))


# A softmax over tens of keys and sums over them: some ten roundings of 2^-53 or 2^-24 in a norm-relative error.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", GROUPS)
def test_packed_attention_equals_its_definition(name, attention, dtype, tolerance):
    row, *tensors = case(GROUPS[name], dtype, attention=attention)
    got = outcome(lambda q, k, v: row.attend(0, q, k, v, DIM**-0.5), *tensors)
    assert distance(got, by_definition(row, *tensors)) < tolerance


@pytest.mark.parametrize("name", GROUPS)
def test_flex_attention_sees_the_same_keys(name):  # forward only: on a CPU it has no backward pass
    row, *tensors = case(GROUPS[name], torch.float64, attention="flex_attention")
    got = row.attend(0, *tensors[:3], DIM**-0.5)
    assert distance([got], by_definition(row, *tensors)[:1]) < 1e-14


@pytest.mark.parametrize("name", GROUPS)
def test_bf16_is_as_near_as_attention_without_sharing(name):
    row, *tensors = case(GROUPS[name], torch.bfloat16)
    expected = by_definition(row, *tensors)
    shared = distance(outcome(lambda q, k, v: row.attend(0, q, k, v, DIM**-0.5), *tensors), expected)
    plain = distance(outcome(lambda q, k, v: masked_attention(q, k, v, row.mask, DIM**-0.5).transpose(1, 2), *tensors), expected)
    assert shared < max(2 * plain, 2**-7)  # two parts are rounded to bf16, and once more when they are joined


def test_gradients_do_not_depend_on_the_number_of_threads():
    row, *tensors = case(((70, (40, 33, 40)), (50, (20,))), torch.float32)
    before = torch.get_num_threads()
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made.append(outcome(lambda q, k, v: row.attend(0, q, k, v, DIM**-0.5), *tensors))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*made))


def test_predicting_tokens_are_the_ones_before():
    row = PackedRow(((3, (2, 1)), (2, (2,))), torch.device("cpu"), "sdpa")
    assert row.predicting.tolist() == [2, 3, 2, 7, 8]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2", "flex_attention"])
@pytest.mark.parametrize("name", ["ragged", "no_responses", "equal"])
def test_packed_attention_on_a_gpu(name, attention):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    row, *tensors = case(GROUPS[name], torch.bfloat16, "cuda", attention, dim=64)
    got = outcome(lambda q, k, v: row.attend(0, q, k, v, 64**-0.5), *tensors)
    assert distance(got, by_definition(row, *tensors)) < 2**-6  # a few roundings of 2^-9 to bf16
