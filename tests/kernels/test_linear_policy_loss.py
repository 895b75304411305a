"""linear_policy_loss: equal to the plain path, three GEMMs on the rows that matter, never all logits at once."""

import importlib
import math

import pytest
import torch

import aot_fast.kernels as K

from . import oracle
from .oracle import BF16, FP32, error

pytestmark = pytest.mark.usefixtures("each_backend")

module = importlib.import_module("aot_fast.kernels.linear_policy_loss")  # the package's attribute of that name is the function

LENGTHS = (9, 1, 14, 6, 10)
VOCABULARY = 53


def batch(dtype=torch.float64, seed=0):
    """40 tokens in ragged sequences, one of them (14) longer than the gspo chunks; one target is -100, one advantage 0."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)
    hidden = torch.randn(n, 12, generator=generator, dtype=torch.float64).to(dtype)
    weight = (torch.randn(VOCABULARY, 12, generator=generator, dtype=torch.float64) / 2).to(dtype)
    targets = torch.randint(0, VOCABULARY, (n,), generator=generator)
    logp = oracle.logprob(hidden.double() @ weight.double().T, targets)[0]
    targets[6] = -100
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    advantages[11] = 0.0
    advantages[30:40] = 0.0  # a whole sequence
    options = {
        "old_logp": logp - 0.6 * torch.randn(n, generator=generator, dtype=torch.float64),
        "ref_logp": logp + 0.5 * torch.randn(n, generator=generator, dtype=torch.float64),
        "mask": torch.rand(n, generator=generator) > 0.2,
        "seq_ids": torch.repeat_interleave(torch.arange(5), torch.tensor(LENGTHS)),
        "max_length": 16,
    }
    low = torch.float64 if dtype == torch.float64 else torch.float32
    options = {k: v.to(low) if k.endswith("logp") else v for k, v in options.items()}
    return hidden.requires_grad_(), weight.requires_grad_(), targets, advantages.to(low), options


def plain(hidden, weight, targets, advantages, entropy_coef=0.0, temperature=1.0, **options):
    """The four-GEMM path."""
    out = K.linear_logprob(hidden, weight, targets, temperature=temperature)
    return K.policy_loss(out.logp, advantages, valid=out.valid, entropy=out.entropy, entropy_coef=entropy_coef, **options)


@pytest.mark.parametrize("loss", ("ppo", "gspo", "cispo"))
@pytest.mark.parametrize("agg", ("token", "seq_mean", "seq_sum_norm"))
@pytest.mark.parametrize(("beta", "entropy_coef"), ((0.0, 0.0), (0.2, 0.0), (0.0, 0.1)))
@pytest.mark.parametrize("chunk_rows", (10, 4096))  # several chunks with a remainder and a sequence that does not fit; one chunk
def test_equal_to_the_plain_path(loss, agg, beta, entropy_coef, chunk_rows):
    hidden, weight, targets, advantages, options = batch()
    options |= {"loss": loss, "agg": agg, "beta": beta, "entropy_coef": entropy_coef, "temperature": 0.9}
    fused = K.linear_policy_loss(hidden, weight, targets, advantages, chunk_rows=chunk_rows, **options)
    expected = plain(hidden, weight, targets, advantages, **options)
    assert error(fused.loss, expected.loss) < 1e-12
    got, want = (torch.autograd.grad(out.loss, (hidden, weight)) for out in (fused, expected))
    assert error(got[0], want[0]) < 1e-12 and error(got[1], want[1]) < 1e-12
    assert fused.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        torch.testing.assert_close(fused.metrics[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_fp32_matches_the_oracle():
    hidden, weight, targets, advantages, options = batch(torch.float32)
    out = K.linear_policy_loss(hidden, weight, targets, advantages, beta=0.1, entropy_coef=0.05, chunk_rows=7, **options)
    ours = torch.autograd.grad(out.loss, (hidden, weight))
    h, w = oracle.leaf(hidden), oracle.leaf(weight)
    logp, entropy = oracle.logprob(h @ w.T, targets)
    mask = options["mask"] & (targets >= 0)
    settings = {"loss": "ppo", "agg": "token", "kl": "k3", "dual_clip": 3.0, "beta": 0.1, "clip_low": 0.2, "clip_high": 0.28}
    fields = (advantages.double(), options["old_logp"].double(), options["ref_logp"].double(), mask.tolist(), options["seq_ids"].tolist())
    value, metrics = oracle.policy_loss(logp, *fields, **settings, entropy=entropy, entropy_coef=0.05)
    exact = torch.autograd.grad(value, (h, w))
    assert error(out.loss, value) <= FP32 and error(ours[0], exact[0]) <= FP32 and error(ours[1], exact[1]) <= FP32
    assert out.metrics["sum/entropy"].item() == pytest.approx(entropy.detach()[mask].sum().item(), rel=FP32)
    assert out.metrics["count/invalid"] == 1 and out.metrics["count/tokens"] == metrics["count/tokens"]


def test_bf16_is_as_good_as_torch():
    hidden, weight, targets, advantages, options = batch(torch.bfloat16)
    out = K.linear_policy_loss(hidden, weight, targets, advantages, chunk_rows=16, **options)
    ours = torch.autograd.grad(out.loss, (hidden, weight))
    h, w = oracle.leaf(hidden), oracle.leaf(weight)
    exact = torch.autograd.grad(plain(h, w, targets, advantages.double(), **options).loss, (h, w))
    logits = (hidden @ weight.T).float()
    logp = torch.log_softmax(logits, -1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    theirs = torch.autograd.grad(K.policy_loss(logp, advantages, valid=targets >= 0, **options).loss, (hidden, weight))
    for mine, torchs, truth in zip(ours, theirs, exact):
        assert mine.dtype == torch.bfloat16
        assert error(mine, truth) <= BF16 and error(mine, truth) <= 2 * error(torchs, truth)


@pytest.mark.parametrize(("loss", "beta", "rows"), (("ppo", 0.0, "nonzero"), ("gspo", 0.0, "sequences"), ("ppo", 0.1, "unmasked")))
def test_only_rows_that_can_have_a_gradient_enter_the_backward_gemms(monkeypatch, loss, beta, rows):
    hidden, weight, targets, advantages, options = batch()
    forward, backward = [], []
    logits, add = module.chunk_logits, module.HeadGradients.add
    monkeypatch.setattr(module, "chunk_logits", lambda h, *a: forward.append(len(h)) or logits(h, *a))
    monkeypatch.setattr(module.HeadGradients, "add", lambda self, index, h, d: backward.append(len(d)) or add(self, index, h, d))
    K.linear_policy_loss(hidden, weight, targets, advantages, loss=loss, beta=beta, chunk_rows=20, **options)
    live = options["mask"] & (targets >= 0)
    expected = {"nonzero": live & (advantages != 0), "sequences": live & (options["seq_ids"] != 4), "unmasked": live}[rows]
    assert sum(backward) == expected.sum() and sum(forward) == live.sum()
    assert max(forward) <= 20 and max(backward) <= 20


def test_a_long_gspo_sequence_is_scored_first_and_never_exceeds_a_chunk(monkeypatch):
    hidden, weight, targets, advantages, options = batch()
    forward, logits = [], module.chunk_logits
    monkeypatch.setattr(module, "chunk_logits", lambda h, *a: forward.append(len(h)) or logits(h, *a))
    K.linear_policy_loss(hidden, weight, targets, advantages, loss="gspo", beta=0.1, chunk_rows=5, **options)
    assert max(forward) <= 5 and sum(forward) > (options["mask"] & (targets >= 0)).sum()


def test_masked_rows_may_hold_nan():
    hidden, weight, targets, advantages, options = batch()
    clean = torch.autograd.grad(K.linear_policy_loss(hidden, weight, targets, advantages, **options).loss, (hidden, weight))
    off = ~options["mask"]
    dirty = torch.where(off[:, None], math.nan, hidden.detach()).requires_grad_()
    for name in ("old_logp", "ref_logp"):
        options[name] = torch.where(off, math.nan, options[name])
    out = K.linear_policy_loss(dirty, weight, targets, torch.where(off, math.inf, advantages), **options)
    got = torch.autograd.grad(out.loss, (dirty, weight))
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1]) and (got[0][off] == 0).all()


def test_a_frozen_side_skips_its_gradient(monkeypatch):
    made, original = [], module.HeadGradients
    monkeypatch.setattr(module, "HeadGradients", lambda *a: made.append(a[2:]) or original(*a))
    hidden, weight, targets, advantages, options = batch()
    want = torch.autograd.grad(K.linear_policy_loss(hidden, weight, targets, advantages, **options).loss, (hidden, weight))
    frozen_weight = K.linear_policy_loss(hidden, weight.detach(), targets, advantages, **options)
    assert torch.equal(torch.autograd.grad(frozen_weight.loss, hidden)[0], want[0])
    frozen_hidden = K.linear_policy_loss(hidden.detach(), weight, targets, advantages, **options)
    assert torch.equal(torch.autograd.grad(frozen_hidden.loss, weight)[0], want[1])
    with torch.no_grad():
        none = K.linear_policy_loss(hidden, weight, targets, advantages, **options)
    assert not none.loss.requires_grad and error(none.loss, frozen_hidden.loss) < 1e-12
    assert made == [(True, True), (True, False), (False, True), (False, False)]


def test_tied_embeddings_and_strided_hidden():
    _, weight, targets, advantages, options = batch()
    tokens = torch.arange(80) % VOCABULARY
    results = []
    for path in (K.linear_policy_loss, plain):
        states = torch.nn.functional.embedding(tokens, weight).tanh()[1::2]
        results.append(torch.autograd.grad(path(states, weight, targets, advantages, **options).loss, weight)[0])
    assert error(*results) < 1e-12


def test_the_upstream_scalar_scales_and_the_graph_can_be_kept():
    hidden, weight, targets, advantages, options = batch()
    loss = K.linear_policy_loss(hidden, weight, targets, advantages, **options).loss
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad(-4.0 * loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    for first, second, third in zip(once, scaled, again):
        assert torch.equal(second, -4 * first) and torch.equal(third, first)


def test_dweight_out_accumulates_in_fp32_what_bf16_gradients_lose():
    hidden, weight, targets, advantages, options = batch(torch.bfloat16)
    buffer = torch.full(weight.shape, 1.0)
    for scale in (2.0, 0.5):
        (scale * K.linear_policy_loss(hidden, weight, targets, advantages, dweight_out=buffer, **options).loss).backward()
    assert weight.grad is None and hidden.grad is not None
    exact_weight = weight.detach().float().requires_grad_()
    exact_loss = K.linear_policy_loss(hidden.detach().float(), exact_weight, targets, advantages, **options).loss
    (exact,) = torch.autograd.grad(exact_loss, exact_weight)
    assert error(buffer - 1.0, 2.5 * exact) <= 2**-8  # dlogits are rounded to bf16; the buffer itself is not
    assert not torch.equal(buffer, buffer.bfloat16().float())


def test_micro_batches_equal_one_batch():
    hidden, weight, targets, advantages, options = batch()
    live = options["mask"] & (targets >= 0)
    options |= {"num_tokens": live.sum(), "num_sequences": torch.tensor(4.0)}
    whole = K.linear_policy_loss(hidden, weight, targets, advantages, **options)
    want = torch.autograd.grad(whole.loss, (hidden, weight))
    parts = []
    for rows in (slice(0, 10), slice(10, 24), slice(24, 40)):
        some = {k: v[rows] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in options.items()}
        parts.append(K.linear_policy_loss(hidden[rows], weight, targets[rows], advantages[rows], **some))
    total = sum(p.loss for p in parts)
    got = torch.autograd.grad(total, (hidden, weight))
    assert error(total, whole.loss) < 1e-12 and error(got[0], want[0]) < 1e-12 and error(got[1], want[1]) < 1e-12
    combined = K.combine_metrics([p.metrics for p in parts])
    for name, value in whole.metrics.items():
        torch.testing.assert_close(combined[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_two_runs_have_the_same_bits():
    hidden, weight, targets, advantages, options = batch(torch.float32)
    runs = []
    for _ in range(2):
        out = K.linear_policy_loss(hidden, weight, targets, advantages, chunk_rows=7, **options)
        runs.append((out.loss, *torch.autograd.grad(out.loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("num_rows", (0, 3))
def test_nothing_unmasked_gives_an_attached_zero(num_rows):
    hidden = torch.randn(num_rows, 4, requires_grad=True)
    weight = torch.randn(9, 4, requires_grad=True)
    mask = torch.zeros(num_rows, dtype=torch.bool)
    targets = torch.zeros(num_rows, dtype=torch.int64)
    for loss in ("ppo", "gspo"):
        out = K.linear_policy_loss(hidden, weight, targets, torch.ones(num_rows), mask=mask, seq_ids=targets, loss=loss)
        gradients = torch.autograd.grad(out.loss, (hidden, weight))
        assert out.loss == 0 and all((g == 0).all() for g in gradients)
        assert out.metrics["count/masked"] == num_rows


def test_errors_name_what_was_given_and_what_was_expected():
    hidden, weight, targets, advantages, options = batch()
    cases = (
        ({"dweight_out": torch.zeros(2, 2, dtype=torch.float64)}, r"dweight_out: given shape \(2, 2\)"),
        ({"dweight_out": torch.zeros(VOCABULARY, 12)}, "dweight_out: given torch.float32, expected one of"),
        ({"chunk_rows": 0}, "chunk_rows: given 0, expected at least 1"),
        ({"loss": "vpg"}, "loss: given 'vpg'"),
        ({"temperature": -1.0}, "temperature: given -1.0"),
    )
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            K.linear_policy_loss(hidden, weight, targets, advantages, **(options | wrong))
    with pytest.raises(ValueError, match="a weight that requires a gradient"):
        buffer = torch.zeros(VOCABULARY, 12, dtype=torch.float64)
        K.linear_policy_loss(hidden, weight.detach(), targets, advantages, dweight_out=buffer, **options)


@pytest.mark.parametrize("loss", ("ppo", "gspo"))
def test_on_policy_tokens_have_ratio_one_and_are_compared(loss):
    """As with the trainer's own log-probs written into old_logp; the recorded ones are only compared."""
    hidden, weight, targets, advantages, options = batch()
    own = K.linear_logprob(hidden, weight, targets).logp.detach()
    fresh = options["seq_ids"] % 2 == 0
    recorded = torch.where(fresh, own + 1e-3, options["old_logp"])
    recorded[9] += 0.25  # of the second sequence, which an older policy sampled
    recorded[20] -= 0.5
    options |= {"loss": loss, "agg": "seq_mean", "chunk_rows": 10}
    masked = fresh & ~options["mask"]
    recorded[masked] = math.nan
    given = {**options, "old_logp": recorded, "on_policy": fresh}
    fused = K.linear_policy_loss(hidden, weight, targets, advantages, **given)
    written = options | {"old_logp": torch.where(fresh, own, recorded)}
    expected = K.linear_policy_loss(hidden, weight, targets, advantages, **written)
    out = K.linear_logprob(hidden, weight, targets)
    given.pop("chunk_rows")
    unfused = K.policy_loss(out.logp, advantages, valid=out.valid, entropy=out.entropy, **given)
    want = torch.autograd.grad(expected.loss, (hidden, weight))
    for got in (fused, unfused):
        assert error(got.loss, expected.loss) < 1e-12
        for ours, theirs in zip(torch.autograd.grad(got.loss, (hidden, weight)), want):
            assert error(ours, theirs) < 1e-12
        assert got.metrics["max/logp_mismatch"].item() == pytest.approx(
            0.5 - 1e-3 if bool(fresh[20] & options["mask"][20]) else 1e-3, abs=1e-6
        )
        for name, value in expected.metrics.items():
            torch.testing.assert_close(got.metrics[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("loss", ("ppo", "gspo", "cispo"))
def test_no_tokens_give_every_metric_and_zero_gradients(loss):
    """A rank without tokens must not lack a name, nor a gradient: the others wait for it."""
    hidden, weight, targets, advantages, options = batch(torch.float32)
    options |= {"loss": loss, "on_policy": options["mask"]}
    full = K.linear_policy_loss(hidden, weight, targets, advantages, beta=0.1, **options)
    none = K.linear_policy_loss(hidden, weight, targets, advantages, beta=0.1, **options | {"mask": torch.zeros_like(options["mask"])})
    assert none.metrics.keys() == full.metrics.keys() and none.loss.item() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(none.loss, (hidden, weight)))


def test_on_policy_without_old_logp_is_an_error():
    hidden, weight, targets, advantages, options = batch()
    with pytest.raises(ValueError, match="old_logp"):
        K.linear_policy_loss(hidden, weight, targets, advantages, on_policy=options["mask"])


def test_on_policy_ratio_is_one_whatever_precision_was_recorded():
    logp, recorded = torch.randn(50), torch.randn(50).bfloat16()
    out = K.policy_loss(logp, torch.randn(50), old_logp=recorded, on_policy=torch.ones(50, dtype=torch.bool))
    assert out.metrics["max/ratio_deviation"] == 0


def test_an_upstream_scalar_is_not_rounded_to_bf16():
    from aot_fast.kernels.known_gradient import attach_gradients

    known, leaf = torch.randn(200).bfloat16(), torch.zeros(200, dtype=torch.bfloat16, requires_grad=True)
    attach_gradients(torch.zeros(()), (leaf,), (known,)).backward(torch.tensor(1.003))
    assert torch.equal(leaf.grad, (known.float() * 1.003).bfloat16())
