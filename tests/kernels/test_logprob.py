"""logprob and linear_logprob against the oracle, and the inputs that broke public kernels."""

import importlib
import math

import pytest
import torch

import aot_fast.kernels as K

from . import oracle
from .oracle import BF16, FP32, error

pytestmark = pytest.mark.usefixtures("each_backend")

# 1 and 2: degenerate; 17: below any vector; 4,097: one over a block of the fixed-order sum; 9,001: odd, three blocks
VOCABULARIES = (1, 2, 17, 4097, 9001)


def rows(num_rows, vocabulary, seed=0, scale=4.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_rows, vocabulary, generator=generator)
    return logits, torch.randint(0, vocabulary, (num_rows,), generator=generator), generator


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("shift", (0.0, -20.0, -120.0, 120.0))
@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_values_and_gradients_match_the_oracle(vocabulary, shift, temperature):
    logits, targets, generator = rows(5, vocabulary)
    logits = (logits + shift).requires_grad_()
    up_logp, up_entropy = torch.randn(5, generator=generator), torch.randn(5, generator=generator)
    out = K.logprob(logits, targets, temperature=temperature)
    torch.autograd.backward((out.logp, out.entropy), (up_logp, up_entropy))
    exact = oracle.leaf(logits)
    logp, entropy = oracle.logprob(exact, targets, temperature)
    torch.autograd.backward((logp, entropy), (up_logp.double(), up_entropy.double()))
    assert out.logp.dtype == torch.float32 and out.valid.all()
    assert (out.logp - logp).abs().max() <= 1e-5
    assert (out.entropy - entropy).abs().max() <= 1e-5
    assert error(logits.grad, exact.grad) <= FP32 or exact.grad.norm() < 1e-12


@pytest.mark.parametrize("vocabulary", (3000, 17_000))  # three tiles of either size
def test_a_maximum_that_rises_from_tile_to_tile(vocabulary):
    logits, targets, _ = rows(3, vocabulary)
    logits = logits.sort(dim=1).values
    out = K.logprob(logits, targets)
    logp, entropy = oracle.logprob(logits.double(), targets)
    assert (out.logp - logp).abs().max() <= 1e-5 and (out.entropy - entropy).abs().max() <= 1e-5


@pytest.mark.parametrize("probability", (0.9, 0.99, 0.999, 0.9999))
def test_gradient_of_a_likely_target_survives_bf16_logits(probability):
    # The logits are bf16 numbers; 1 - p of the target must come from log p, not from a rounded p.
    logits = torch.zeros(1, 65, dtype=torch.bfloat16)
    logits[0, 3] = math.log(probability / (1 - probability) * 64)
    logits.requires_grad_()
    K.logprob(logits, torch.tensor([3])).logp.sum().backward()
    exact = oracle.leaf(logits)
    oracle.logprob(exact, torch.tensor([3]))[0].sum().backward()
    relative = abs(logits.grad[0, 3].item() / exact.grad[0, 3].item() - 1)
    assert relative < 0.01


def test_the_weights_of_unlikely_tokens_are_not_lost_beside_a_likely_one(each_backend):
    """A target of 1 - p = 4.5e-5 over 32,768 tokens: each other weight is 1e-9 of the maximum's, below fp32's half unit of 1."""
    if each_backend == "triton":
        pytest.skip("32,768 columns take the interpreter long")
    logits = torch.full((1, 32_768), -20.4, requires_grad=True)
    with torch.no_grad():
        logits[0, 5] = 0
    out = K.logprob(logits, torch.tensor([5]))
    (gradient,) = torch.autograd.grad(out.logp.sum(), logits)
    rest = 32_767 * math.exp(-20.4)
    # each weight is off by 2e-7; z = -20.4 is rounded by 1e-6
    assert gradient[0, 5].item() == pytest.approx(rest / (1 + rest), rel=3e-6 if each_backend != "cuda" else 1e-2)


def test_minus_infinity_and_targets_out_of_range():
    logits, targets, generator = rows(7, 4100)
    logits[0, 5] = -math.inf
    logits[1, :4096] = -math.inf  # a first block without a finite number
    targets[1] = 4098
    logits[2, targets[2]] = -math.inf
    logits[3] = -math.inf
    targets[4], targets[5] = -100, 4100
    logits.requires_grad_()
    out = K.logprob(logits, targets)
    assert out.valid.tolist() == [True, True, False, False, False, False, True]
    (out.logp * torch.randn(7, generator=generator) + out.entropy).sum().backward()
    assert all(torch.isfinite(t).all() for t in (out.logp, out.entropy, logits.grad))
    dead = ~out.valid
    assert (out.logp[dead] == 0).all() and (out.entropy[dead] == 0).all() and (logits.grad[dead] == 0).all()
    logp, entropy = oracle.logprob(logits.detach().double(), targets)
    assert error(out.logp, logp) <= FP32 and error(out.entropy, entropy) <= FP32
    assert (logits.grad[1, :4096] == 0).all() and logits.grad[1, 4096:].abs().sum() > 0


@pytest.mark.parametrize("low", (-1e36, -1e38, torch.finfo(torch.float32).min))  # what masks columns in place of -inf
def test_very_low_logits_are_as_minus_infinity(low):
    logits, targets, _ = rows(2, 9001)
    logits[:, :4500], targets[:] = low, 8000
    hidden = logits.clone()
    hidden[:, :4500] = -math.inf
    results = []
    for leaf in (logits.requires_grad_(), hidden.requires_grad_()):
        out = K.logprob(leaf, targets)
        results.append((out.logp, out.entropy, *torch.autograd.grad(out.logp.sum() + out.entropy.sum(), leaf)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_a_row_of_nan_without_upstream_gradient_gets_zero():
    logits, targets, _ = rows(3, 33)
    logits[1] = math.nan
    logits.requires_grad_()
    out = K.logprob(logits, targets)
    torch.where(torch.tensor([True, False, True]), out.logp, 0).sum().backward()
    assert (logits.grad[1] == 0).all() and torch.isfinite(logits.grad).all() and logits.grad[0].abs().sum() > 0


def test_upstream_gradients_of_any_layout():
    logits, targets, generator = rows(6, 129)
    exact = oracle.leaf(logits)
    per_row = torch.randn(6, 1, generator=generator)
    uses = {
        "random": lambda p: (p * per_row[:, 0].to(p.dtype)).sum(),
        "scalar": lambda p: -2.5 * p.sum(),
        "expanded": lambda p: p.mean(),
        "broadcast": lambda p: (p.view(6, 1) * per_row.to(p.dtype).expand(6, 4)).sum(),
    }
    for name, use in uses.items():
        leaf = logits.clone().requires_grad_()
        (expected,) = torch.autograd.grad(use(oracle.logprob(exact, targets)[0]), exact)
        value = use(K.logprob(leaf, targets).logp)
        (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(value, leaf)
        assert error(first, expected) <= FP32, name
        assert torch.equal(first, second), name


@pytest.mark.parametrize("num_rows", (0, 1, 65_536, 65_537))  # empty, one, and the two sides of a grid limit
def test_row_counts(num_rows, each_backend):
    if each_backend == "triton" and num_rows > 1:
        pytest.skip("65,536 interpreted programs take two minutes; rows are the grid's first axis, whose limit is 2^31 - 1")
    logits, targets, _ = rows(num_rows, 3)
    logits.requires_grad_()
    out = K.logprob(logits, targets)
    out.logp.sum().backward()
    expected = torch.log_softmax(logits.detach().double(), -1).gather(1, targets[:, None])[:, 0]
    assert out.logp.shape == (num_rows,) and error(out.logp, expected) <= FP32
    assert logits.grad.shape == logits.shape


def test_strided_logits_and_misaligned_targets():
    logits, targets, _ = rows(9, 64)
    transposed = logits.T.contiguous().T
    shifted = torch.cat([targets[:1], targets])[1:]
    assert shifted.data_ptr() % 16 == 8
    plain = K.logprob(logits[1::2, 3:60], targets[1::2] % 57)
    assert torch.equal(plain.logp, K.logprob(transposed[1::2, 3:60], shifted[1::2] % 57).logp)
    assert torch.equal(plain.logp, K.logprob(logits[1::2, 3:60].contiguous(), (targets[1::2] % 57).int()).logp)


@pytest.mark.parametrize("vocabulary", (17, 9001, 40_001))  # 40,001: above the size at which torch.sum splits a row over threads
def test_a_row_has_the_same_bits_alone_in_a_batch_permuted_and_on_any_thread_count(vocabulary):
    logits, targets, generator = rows(6, vocabulary)
    upstream = torch.randn(6, generator=generator)

    def run(index):
        leaf = logits[index].clone().requires_grad_()
        out = K.logprob(leaf, targets[index])
        (gradient,) = torch.autograd.grad(((out.logp + out.entropy) * upstream[index]).sum(), leaf)
        return torch.cat([out.logp.detach()[:, None], out.entropy.detach()[:, None], gradient], dim=1)

    whole = run(torch.arange(6))
    order = torch.randperm(6, generator=generator)
    assert torch.equal(run(order), whole[order])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(run(torch.arange(6)), whole)
        assert torch.equal(torch.cat([run(torch.tensor([i])) for i in range(6)]), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("chunk_rows", (1, 4, 11, 64))  # one row, a remainder, exactly all, more than all
def test_linear_matches_the_oracle_in_any_chunking(chunk_rows):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(11, 24, generator=generator).requires_grad_()
    weight = torch.randn(61, 24, generator=generator).requires_grad_()
    targets = torch.randint(0, 61, (11,), generator=generator)
    targets[4] = -100
    upstream = torch.randn(2, 11, generator=generator)
    out = K.linear_logprob(hidden, weight, targets, temperature=0.8, chunk_rows=chunk_rows)
    torch.autograd.backward((out.logp, out.entropy), tuple(upstream))
    h, w = oracle.leaf(hidden), oracle.leaf(weight)
    logp, entropy = oracle.logprob(h @ w.T, targets, 0.8)
    torch.autograd.backward((logp, entropy), tuple(upstream.double()))
    assert out.valid.tolist() == [i != 4 for i in range(11)]
    for name, actual, expected in (
        ("logp", out.logp, logp),
        ("entropy", out.entropy, entropy),
        ("dhidden", hidden.grad, h.grad),
        ("dweight", weight.grad, w.grad),
    ):
        assert error(actual, expected) <= FP32, name
    assert (hidden.grad[4] == 0).all()


def test_linear_permuted_has_the_same_bits_and_alone_nearly():
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(64, 32, generator=generator), torch.randn(128, 32, generator=generator)
    targets = torch.randint(0, 128, (64,), generator=generator)
    order = torch.randperm(64, generator=generator)
    whole = K.linear_logprob(hidden, weight, targets).logp
    assert torch.equal(K.linear_logprob(hidden[order], weight, targets[order]).logp, whole[order])
    alone = torch.cat([K.linear_logprob(hidden[i : i + 1], weight, targets[i : i + 1]).logp for i in range(64)])
    assert (alone - whole).abs().max() <= 1e-4


def test_linear_bf16_is_as_good_as_torch():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(40, 64, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(301, 64, generator=generator) / 4).bfloat16().requires_grad_()
    targets = torch.randint(0, 301, (40,), generator=generator)
    upstream = torch.randn(40, generator=generator)
    h, w = oracle.leaf(hidden), oracle.leaf(weight)
    exact = oracle.logprob(h @ w.T, targets)[0]
    expected = torch.autograd.grad((exact * upstream.double()).sum(), (h, w))
    logp = K.linear_logprob(hidden, weight, targets, chunk_rows=16).logp
    ours = torch.autograd.grad((logp * upstream).sum(), (hidden, weight))
    plain = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]
    theirs = torch.autograd.grad((plain * upstream).sum(), (hidden, weight))
    assert (logp - exact).abs().max() <= 1e-4  # fp32 logits of the bf16 inputs
    for mine, torchs, truth in zip(ours, theirs, expected):
        assert mine.dtype == torch.bfloat16
        assert error(mine, truth) <= BF16 and error(mine, truth) <= 2 * error(torchs, truth)
    rounded = K.linear_logprob(hidden, weight, targets, logits_dtype=torch.bfloat16).logp
    assert 1e-4 < (rounded - exact).abs().max() <= 0.1


def test_linear_leaves_masked_rows_of_nan_out_of_every_gradient():
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(6, 8, generator=generator)
    hidden[2] = math.nan
    hidden.requires_grad_()
    weight = torch.randn(20, 8, generator=generator).requires_grad_()
    logp = K.linear_logprob(hidden, weight, torch.arange(6)).logp
    torch.where(torch.arange(6) != 2, logp, 0).sum().backward()
    assert torch.isfinite(weight.grad).all() and torch.isfinite(hidden.grad).all() and (hidden.grad[2] == 0).all()


def test_errors_name_what_was_given_and_what_was_expected():
    logits, targets, _ = rows(3, 8)
    cases = (
        (lambda: K.logprob(logits[0], targets), r"logits: given shape \(8,\), expected shape \('any', 'any'\)"),
        (lambda: K.logprob(logits, targets[:2]), r"targets: given shape \(2,\), expected shape \(3,\)"),
        (lambda: K.logprob(logits, targets.float()), r"targets: given torch.float32, expected one of \['int64', 'int32'\]"),
        (lambda: K.logprob(logits, targets, temperature=0.0), "temperature: given 0.0, expected more than 0"),
        (lambda: K.linear_logprob(logits, logits.double(), targets), r"weight: given torch.float64, expected one of \['float32'\]"),
        (lambda: K.linear_logprob(logits, logits, targets, chunk_rows=0), "chunk_rows: given 0, expected at least 1"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def stats_and_upstream(num_rows, vocabulary):
    logits, targets, generator = rows(num_rows, vocabulary)
    targets[0] = -100
    logits[1] = math.nan  # without upstream gradient
    dlogp, dentropy = torch.randn(2, num_rows, generator=generator)
    dlogp[1] = dentropy[1] = 0
    return logits, targets, dlogp, dentropy


@pytest.mark.parametrize("vocabulary", (17, 4096, 9001))  # below a tile, the last of the small tiles, two and a bit of the large ones
@pytest.mark.parametrize("with_entropy", (False, True))
def test_the_gradient_in_the_logits_own_memory_is_the_same(vocabulary, with_entropy, each_backend):
    reference = each_backend == "reference"
    module = {"reference": "logprob", "csrc": "native"}.get(each_backend, "logprob_triton")
    passes = importlib.import_module(f"aot_fast.kernels.{module}")
    logits, targets, dlogp, dentropy = stats_and_upstream(5, vocabulary)
    bonus = dentropy if with_entropy else None
    stats = passes.row_stats(logits, targets, 0.7)
    half = torch.bfloat16 if each_backend == "cuda" else torch.float16  # the interpreter truncates bf16
    dtype = torch.float32 if reference else half  # the reference keeps to the memory where the dtypes agree
    apart = passes.logit_gradient(logits, targets, stats, dlogp, bonus, 0.7, dtype)
    memory = logits.data_ptr()
    inside = passes.consumed_gradient(logits, targets, stats, dlogp, bonus, 0.7, dtype)
    assert inside.data_ptr() == memory and torch.equal(inside, apart) and (inside[:2] == 0).all()


def test_registered_operators_keep_their_promises(operators):
    logits, targets, generator = rows(3, 33)
    dlogp, dentropy = torch.randn(2, 3, generator=generator)
    stats = operators.row_stats(logits, targets, 1.0)
    torch.library.opcheck(operators.row_stats.default, (logits, targets, 1.0))
    torch.library.opcheck(operators.logit_gradient.default, (logits, targets, *stats, dlogp, dentropy, 1.0, logits.dtype))
    torch.library.opcheck(operators.logit_gradient_in_place.default, (logits, targets, *stats, dlogp, None, 1.0, torch.float16))


def test_compiled_is_the_same(each_backend):
    if each_backend not in ("csrc", "cuda"):  # where csrc is, a C++ compiler is, which the compiler's CPU backend needs
        pytest.skip("two backends are enough")
    logits, targets, _ = rows(7, 9001)
    logits.requires_grad_()

    def value(z):
        out = K.logprob(z, targets, temperature=0.9)
        return out.logp.sum() + 0.1 * out.entropy.sum()

    plain = torch.autograd.grad(value(logits), logits)[0]
    assert torch.equal(torch.autograd.grad(torch.compile(value, fullgraph=True)(logits), logits)[0], plain)
