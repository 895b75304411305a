"""row_loss of csrc/cuda against the passes it replaces, on a GPU."""

import math

import pytest
import torch
from aot_fast.kernels.logprob import logit_gradient, row_stats
from aot_fast.kernels.policy_loss import PolicySettings, loss_and_gradients, token_batch

from aot_fast.kernels import row_loss_cuda

pytestmark = pytest.mark.gpu

# 8: most blocks of the cluster have nothing; 4,096: a piece each; 9,000: an odd last slice; 152,064: Qwen2.5-VL's; 262,144: one fp32 buffer
VOCABULARIES = (8, 4096, 9000, 152_064, 262_144)


@pytest.fixture
def built():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if row_loss_cuda.problem():
        pytest.skip(row_loss_cuda.problem())


def rows(num_rows, vocabulary, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    logits = (3 * torch.randn(num_rows, vocabulary, device="cuda", generator=g)).to(dtype)
    targets = torch.randint(0, vocabulary, (num_rows,), device="cuda", generator=g)
    noise = torch.randn(3, num_rows, device="cuda", generator=g)
    logp = row_stats(logits, targets, 0.9).logp
    return logits, targets, noise[0], logp + 0.3 * noise[1], logp + 0.3 * noise[2], torch.rand(num_rows, device="cuda", generator=g) > 0.2


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize(
    ("logits_dtype", "dtype"), [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16,) * 2]
)
@pytest.mark.parametrize(("loss", "entropy_coef"), [("ppo", 0.0), ("ppo", 0.01), ("cispo", 0.0)])
def test_it_agrees_with_the_passes_that_it_replaces(built, vocabulary, logits_dtype, dtype, loss, entropy_coef):
    logits, targets, advantages, old, ref, mask = rows(300, vocabulary, logits_dtype)  # 300: clusters take several rows each
    if vocabulary > 8:
        targets[0], logits[1, targets[1]], logits[2, 7] = -100, -math.inf, -math.inf
    if vocabulary > 4096:
        logits[4, :4096] = torch.finfo(logits_dtype).min  # finite, and its sums overflow
        logits[5, targets[5]] = math.nan  # in a live row: it shows
    logits[3], mask[3] = math.nan, False
    s = PolicySettings(loss, 0.2, 0.28, 3.0, 0.1, "k3", "token", None, None, None, entropy_coef)
    batch = token_batch(s, torch.float32, advantages, old, ref, mask, None)
    stats = row_stats(logits, targets, 0.9)
    batch = batch._replace(mask=batch.mask & stats.valid, weight=torch.where(stats.valid, batch.weight, 0))
    _, dlogp, dentropy, _ = loss_and_gradients(stats.logp, stats.entropy, batch, s)
    expected = logit_gradient(logits, targets, stats, dlogp, dentropy, 0.9, torch.float32)
    logp, entropy, valid, gradient = row_loss_cuda.row_loss(logits, targets, batch, s, 0.9, dtype)
    known = ~stats.logp.isnan()
    live = stats.valid & known
    assert torch.equal(valid[known], stats.valid[known]) and torch.equal(logp.isnan()[batch.mask], stats.logp.isnan()[batch.mask])
    assert (logp[live] - stats.logp[live]).abs().max() <= 1e-4 and (entropy[live] - stats.entropy[live]).abs().max() <= 1e-4
    # bf16 rounds at 2^-9; fp32: __expf of -20 is off by 1e-6
    bound = 4e-3 if dtype == torch.bfloat16 else 1e-5
    finite = ~expected.isnan().any(1)
    assert (gradient[finite].float() - expected[finite]).norm() <= bound * expected[finite].norm()
    assert (gradient[~batch.mask] == 0).all()


@pytest.mark.parametrize("num_rows", (0, 1, 7))  # fewer than clusters
@pytest.mark.parametrize("kl", ("k1", "k2"))
def test_few_rows_a_wide_stride_no_old_and_no_dual_clip(built, num_rows, kl):
    logits, targets, advantages, _, ref, mask = rows(num_rows, 4096, torch.float32)
    logits = torch.cat([logits, torch.full_like(logits[:, :64], math.nan)], 1)[:, :4096]
    s = PolicySettings("ppo", 0.2, 0.28, None, 0.1, kl, "token", None, None, None, 0.0)
    batch = token_batch(s, torch.float32, advantages, None, ref, mask, None)
    stats = row_stats(logits, targets, 1.0)
    _, dlogp, _, _ = loss_and_gradients(stats.logp, stats.entropy, batch, s)
    expected = logit_gradient(logits, targets, stats, dlogp, None, 1.0, torch.float32)
    gradient = row_loss_cuda.row_loss(logits, targets, batch, s, 1.0, torch.float32)[3]
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_two_runs_have_the_same_bits(built):
    s = PolicySettings("ppo", 0.2, 0.28, 3.0, 0.0, "k3", "token", None, None, None, 0.0)
    results = []
    for _ in range(2):
        logits, targets, advantages, old, _, mask = rows(700, 9000, torch.float32)
        batch = token_batch(s, torch.float32, advantages, old, None, mask, None)
        results.append([t.clone() for t in row_loss_cuda.row_loss(logits, targets, batch, s, 1.0, torch.bfloat16)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_what_it_cannot_hold_is_refused(built):
    odd = torch.zeros(2, 12, device="cuda")
    assert not row_loss_cuda.fits(odd) and not row_loss_cuda.fits(odd.half()) and row_loss_cuda.fits(torch.zeros(2, 16, device="cuda"))
    assert not row_loss_cuda.fits(torch.zeros(1, 800_000, device="cuda"))
