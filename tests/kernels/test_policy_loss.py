"""policy_loss against the oracle over its whole grid, masks that hide anything, micro-batches, and metrics."""

import itertools
import math
from functools import partial

import pytest
import torch
from aot_fast.kernels.metrics import masked_max
from aot_fast.kernels.policy_loss import PolicySettings, loss_and_gradients, token_batch
from aot_fast.kernels.policy_operators import loss_and_gradients_by
from hypothesis import given, settings
from hypothesis import strategies as st

import aot_fast.kernels as K

from . import oracle
from .oracle import FP32, error

pytestmark = pytest.mark.usefixtures("each_backend")

GRID = list(itertools.product(("ppo", "gspo", "cispo"), ("token", "seq_mean", "seq_sum_norm"), ("k1", "k2", "k3"), (None, 3.0)))


def batch(seed=0, lengths=(9, 1, 14, 6, 10)):
    """Ragged sequences whose ratios reach every branch: inside, both clips, the dual clip, and beyond the clamp of 20."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logp = -3 * torch.rand(n, generator=generator)
    log_ratio = 0.6 * torch.randn(n, generator=generator)
    log_ratio[::7] = 1.5
    log_ratio[3], log_ratio[12] = 25.0, -25.0
    advantages = torch.randn(n, generator=generator)
    advantages[::7] = -advantages[::7].abs()
    advantages[5] = 0.0
    mask = torch.rand(n, generator=generator) > 0.2
    mask[9] = False  # the sequence of one token
    return {
        "logp": logp,
        "advantages": advantages,
        "old_logp": logp - log_ratio,
        "ref_logp": logp + 0.5 * torch.randn(n, generator=generator),
        "mask": mask,
        "seq_ids": torch.repeat_interleave(torch.tensor([3, 4, 7, 8, 20]), torch.tensor(lengths)),
    }


def expected(data, settings, dtype=torch.float64, **more):
    logp = oracle.leaf(data["logp"])
    fields = [data[k].to(dtype) for k in ("advantages", "old_logp", "ref_logp")]
    value, metrics = oracle.policy_loss(logp, *fields, data["mask"].tolist(), data["seq_ids"].tolist(), **settings, **more)
    (gradient,) = torch.autograd.grad(value, logp)
    return value, gradient, metrics


@pytest.mark.parametrize(("loss", "agg", "kl", "dual_clip"), GRID)
def test_the_whole_grid_matches_the_oracle(loss, agg, kl, dual_clip):
    data = batch()
    settings = {
        "loss": loss,
        "agg": agg,
        "kl": kl,
        "dual_clip": dual_clip,
        "beta": 0.3,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "max_length": 16,
    }
    leaf = data["logp"].clone().requires_grad_()
    out = K.policy_loss(leaf, **{k: v for k, v in data.items() if k != "logp"}, **settings)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    value, exact, metrics = expected(data, settings)
    assert error(out.loss, value) <= FP32
    assert error(gradient, exact) <= FP32
    assert (gradient[~data["mask"]] == 0).all()
    for name, number in metrics.items():
        assert out.metrics[name].item() == pytest.approx(number, rel=FP32, abs=FP32), name
    assert out.metrics["count/masked"] == (~data["mask"]).sum()
    assert all(m.shape == () and m.dtype == torch.float32 and not m.requires_grad for m in out.metrics.values())


def test_the_grid_reaches_every_branch():
    metrics = expected(
        batch(), {"loss": "ppo", "agg": "token", "kl": "k3", "dual_clip": 3.0, "beta": 0.0, "clip_low": 0.2, "clip_high": 0.28}
    )[2]
    assert all(metrics[name] >= 2 for name in ("count/clip_low", "count/clip_high", "count/clip_dual"))


def test_defaults_are_dapo():
    data = batch()
    out = K.policy_loss(data["logp"], data["advantages"], old_logp=data["old_logp"], mask=data["mask"])
    settings = {"loss": "ppo", "agg": "token", "kl": "k3", "dual_clip": 3.0, "beta": 0.0, "clip_low": 0.2, "clip_high": 0.28}
    assert error(out.loss, expected(data, settings)[0]) <= FP32


@pytest.mark.parametrize("loss", ("ppo", "gspo"))
@pytest.mark.parametrize("kl", ("k1", "k2", "k3"))
@pytest.mark.parametrize("shift", (-30.0, -19.0, 2.0, 19.0, 30.0))  # beyond the clamp of 20, inside it, beyond the dual clip
@pytest.mark.parametrize("sign", (-1.0, 1.0))
def test_far_ratios_are_clamped_and_gspo_has_no_dual_clip(loss, kl, shift, sign):
    logp = torch.tensor([-35.0, -36.0], requires_grad=True)
    data = {
        "logp": logp.detach(),
        "advantages": torch.full((2,), sign),
        "old_logp": logp.detach() - shift,
        "ref_logp": logp.detach() - shift,
        "mask": torch.ones(2, dtype=torch.bool),
        "seq_ids": torch.zeros(2, dtype=torch.int64),
    }
    settings = {"loss": loss, "agg": "token", "kl": kl, "dual_clip": 3.0, "beta": 0.3, "clip_low": 0.2, "clip_high": 0.28}
    out = K.policy_loss(logp, **{k: v for k, v in data.items() if k != "logp"}, **settings)
    value, exact, _ = expected(data, settings)
    assert error(out.loss, value) <= FP32 and error(torch.autograd.grad(out.loss, logp)[0], exact) <= FP32


@pytest.mark.parametrize("loss", ("ppo", "gspo", "cispo"))
@pytest.mark.parametrize("agg", ("token", "seq_mean", "seq_sum_norm"))
@pytest.mark.parametrize("rubbish", (math.nan, 300.0, -300.0, math.inf))
def test_what_lies_under_the_mask_does_not_matter(loss, agg, rubbish):
    data, clean = batch(), batch()
    hidden = ~data["mask"]
    for name in ("logp", "advantages", "old_logp", "ref_logp"):
        data[name] = torch.where(hidden, rubbish, data[name])
    results = []
    for d in (data, clean):
        leaf = d["logp"].clone().requires_grad_()
        entropy = torch.where(hidden, rubbish, 1.0) if d is data else torch.ones(len(leaf))
        entropy.requires_grad_()
        fields = {k: v for k, v in d.items() if k != "logp"}
        out = K.policy_loss(leaf, **fields, loss=loss, agg=agg, beta=0.2, max_length=16, entropy=entropy, entropy_coef=0.1)
        results.append((out.loss, *torch.autograd.grad(out.loss, (leaf, entropy)), *out.metrics.values()))
    for dirty, tidy in zip(*results):
        assert torch.equal(dirty, tidy)
    assert (results[0][1][hidden] == 0).all() and (results[0][2][hidden] == 0).all()


@pytest.mark.parametrize("num_rows", (0, 5))
def test_nothing_unmasked_gives_a_zero_that_is_attached(num_rows):
    leaf = torch.randn(num_rows, requires_grad=True)
    mask = torch.zeros(num_rows, dtype=torch.bool)
    for agg in ("token", "seq_mean", "seq_sum_norm"):
        ids = torch.zeros(num_rows, dtype=torch.int64)
        out = K.policy_loss(leaf, torch.randn(num_rows), mask=mask, seq_ids=ids, agg=agg, max_length=4, num_tokens=None)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        assert out.loss == 0 and (gradient == 0).all()
        assert all(torch.isfinite(m) for m in out.metrics.values())


def test_without_old_logp_the_ratio_is_one_and_the_gradient_is_that_of_the_policy():
    data = batch()
    leaf = data["logp"].clone().requires_grad_()
    out = K.policy_loss(leaf, data["advantages"], mask=data["mask"])
    out.loss.backward()
    assert out.metrics["max/ratio_deviation"] == 0 and out.metrics["sum/ratio"] == data["mask"].sum()
    torch.testing.assert_close(leaf.grad, torch.where(data["mask"], -data["advantages"] / data["mask"].sum(), 0))


def test_invalid_tokens_count_as_masked_and_zero_coefficients_are_counted():
    data = batch()
    valid = torch.ones(40, dtype=torch.bool)
    first = int(data["mask"].nonzero()[0])
    valid[first] = False
    leaf = data["logp"].clone().requires_grad_()
    out = K.policy_loss(leaf, data["advantages"], old_logp=data["old_logp"], mask=data["mask"], valid=valid)
    out.loss.backward()
    assert out.metrics["count/invalid"] == 1 and out.metrics["count/tokens"] == data["mask"].sum() - 1 and leaf.grad[first] == 0
    assert out.metrics["count/zero_coefficient"] == (data["mask"] & valid & (leaf.grad == 0)).sum() > 3


def test_the_upstream_scalar_scales_and_the_graph_can_be_kept():
    data = batch()
    leaf = data["logp"].clone().requires_grad_()
    out = K.policy_loss(leaf, data["advantages"], old_logp=data["old_logp"])
    (once,) = torch.autograd.grad(out.loss, leaf, retain_graph=True)
    (scaled,) = torch.autograd.grad(out.loss * -4.0, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(out.loss, leaf)
    assert torch.equal(scaled, -4 * once) and torch.equal(once, again)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=7),
    cut=st.integers(1, 6),
    loss=st.sampled_from(("ppo", "gspo", "cispo")),
    agg=st.sampled_from(("token", "seq_mean", "seq_sum_norm")),
    keep=st.integers(0, 2**40),
)
def test_micro_batches_of_unequal_length_equal_one_batch(lengths, cut, loss, agg, keep):
    """The same holds for ranks: a rank is a micro-batch whose sum is taken by an all-reduce."""
    generator = torch.Generator().manual_seed(keep)
    n = sum(lengths)
    logp = torch.randn(n, generator=generator).requires_grad_()
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    fields = {
        "advantages": torch.randn(n, generator=generator),
        "old_logp": logp.detach() + 0.3 * torch.randn(n, generator=generator),
        "ref_logp": torch.randn(n, generator=generator),
        "mask": torch.tensor([(keep >> (i % 40)) & 1 == 1 for i in range(n)]),
        "seq_ids": ids,
    }
    options = {"loss": loss, "agg": agg, "beta": 0.1, "max_length": 9}
    options["num_tokens"] = fields["mask"].sum().clamp(min=1)
    options["num_sequences"] = float(max(1, len(ids[fields["mask"]].unique())))
    whole = K.policy_loss(logp, **fields, **options)
    border = sum(lengths[: min(cut, len(lengths) - 1)])
    parts = [K.policy_loss(logp[s], **{k: v[s] for k, v in fields.items()}, **options) for s in (slice(None, border), slice(border, None))]
    total = parts[0].loss + parts[1].loss
    assert error(total, whole.loss) <= FP32 or abs(total - whole.loss) < 1e-6
    (a,), (b,) = torch.autograd.grad(total, logp), torch.autograd.grad(whole.loss, logp)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    combined = K.combine_metrics([p.metrics for p in parts])
    for name, value in whole.metrics.items():
        torch.testing.assert_close(combined[name], value, rtol=1e-5, atol=1e-5, msg=name)
    # Without the global number the local one is used.
    local = {k: v for k, v in options.items() if not k.startswith("num_")}
    assert error(K.policy_loss(logp, **fields, **local).loss, whole.loss) <= FP32 or abs(whole.loss) < 1e-6


def compare_with_reference(leaves, fields, options, scale=1.0):
    """Loss, gradients and metrics of the backend in force against the reference in fp64; scale: of what the loss sums up."""
    out = K.policy_loss(leaves[0], **fields, entropy=leaves[1], **options)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wide = {k: v.double() if v is not None and v.is_floating_point() else v for k, v in fields.items()}
    expected = K.policy_loss(exact[0], **wide, entropy=exact[1], **options)  # fp64 goes to the reference
    assert abs(out.loss.item() - expected.loss.item()) <= FP32 * scale
    for a, b in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected.loss, exact)):
        torch.testing.assert_close(a.double(), b, rtol=FP32, atol=FP32 * (b.abs().max().item() if len(b) else 1.0))
    assert out.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=FP32, atol=FP32 * len(exact[0]), msg=lambda m, name=name: f"{name}: {m}")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from((1, 2, 60, 128, 150)), min_size=1, max_size=4),  # around the 128 tokens of a block
    masked=st.sampled_from(("nothing", "some", "head", "everything")),
    with_valid=st.booleans(),
    loss=st.sampled_from(("ppo", "gspo", "cispo")),
    agg=st.sampled_from(("token", "seq_mean", "seq_sum_norm")),
    kl=st.sampled_from(("k1", "k2", "k3")),
    seed=st.integers(0, 99),
)
def test_ragged_sequences_over_many_blocks_match_the_reference(lengths, masked, with_valid, loss, agg, kl, seed):
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logp = torch.randn(n, generator=generator).requires_grad_()
    entropy = torch.rand(n, generator=generator).requires_grad_()
    log_ratio = 0.3 * torch.randn(n, generator=generator)
    log_ratio[::5] = 0.0
    advantages = torch.randn(n, generator=generator)
    advantages[::7] = 0.0
    mask = torch.ones(n, dtype=torch.bool)
    if masked == "some":
        mask = torch.rand(n, generator=generator) > 0.4
    elif masked == "head":  # the first live token comes blocks after its sequence starts
        mask[: 2 * n // 3] = False
    elif masked == "everything":
        mask[:] = False
    fields = {
        "advantages": advantages,
        "old_logp": logp.detach() - log_ratio,
        "ref_logp": logp.detach() + 0.3 * torch.randn(n, generator=generator),
        "mask": None if masked == "nothing" else mask,
        "valid": torch.rand(n, generator=generator) > 0.1 if with_valid else None,
        "seq_ids": torch.repeat_interleave(torch.tensor([-9, 3, 2**40, 2**41])[: len(lengths)], torch.tensor(lengths)),
    }
    options = {"loss": loss, "agg": agg, "kl": kl, "beta": 0.2, "max_length": 150, "entropy_coef": 0.05}
    compare_with_reference((logp, entropy), fields, options)


def test_a_sequence_whose_tokens_are_blocks_apart_counts_once():
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[torch.tensor([3, 390, 700, 990])] = True
    ids = (torch.arange(1000) >= 600).long()
    out = K.policy_loss(torch.zeros(1000), torch.ones(1000), mask=mask, seq_ids=ids, agg="seq_sum_norm", max_length=1)
    assert out.loss.item() == -4 / 2


@pytest.mark.parametrize("loss", ("ppo", "gspo"))
@pytest.mark.parametrize("clip", (0.0, 0.2))
def test_ratios_of_exactly_one_send_the_gradient_of_autograd(loss, clip):
    # At clip 0 a ratio of one is both ends of the clip range.
    logp, entropy = torch.full((6,), -1.0, requires_grad=True), torch.ones(6, requires_grad=True)
    fields = {
        "advantages": torch.tensor([1.0, -1.0, 0.0] * 2),
        "old_logp": torch.tensor([-1.0, -1.0, -1.0, -1.1, -0.9, -1.1]),
        "seq_ids": torch.tensor([0, 0, 0, 1, 1, 1]),
    }
    compare_with_reference((logp, entropy), fields, {"loss": loss, "clip_low": clip, "clip_high": clip, "entropy_coef": 0.1})


@pytest.mark.parametrize("kind", (float, torch.int64, torch.float64))
def test_the_normaliser_may_be_a_number_or_a_tensor_and_options_may_be_fp64(kind):
    data = batch()
    plain = K.policy_loss(**data, beta=0.1, num_tokens=17.0)
    number = 17.0 if kind is float else torch.tensor(17, dtype=kind)
    wide = {k: data[k].double() for k in ("advantages", "old_logp", "ref_logp")}
    out = K.policy_loss(**(data | wide), beta=0.1, num_tokens=number)
    assert out.loss.dtype == torch.float32 and torch.equal(out.loss, plain.loss)


def test_expanded_and_strided_inputs():
    data = batch()
    n = len(data["logp"])
    wide = {k: torch.stack([v, v], dim=1)[:, 0] for k, v in data.items()} | {"advantages": torch.full((1,), 0.7).expand(n)}
    leaf, tidy = wide["logp"].detach().requires_grad_(), data["logp"].clone().requires_grad_()
    out = K.policy_loss(leaf, **{k: v for k, v in wide.items() if k != "logp"})
    expected = K.policy_loss(tidy, **{k: v for k, v in data.items() if k not in ("logp", "advantages")}, advantages=torch.full((n,), 0.7))
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(*(torch.autograd.grad(o.loss, x)[0] for o, x in ((out, leaf), (expected, tidy))))


@pytest.mark.parametrize("loss", ("ppo", "gspo"))
def test_two_runs_have_the_same_bits(loss):
    runs = []
    for _ in range(2):
        data = batch()
        leaf = data["logp"].requires_grad_()
        out = K.policy_loss(**data, loss=loss, agg="seq_mean", beta=0.1)
        runs.append((out.loss, *torch.autograd.grad(out.loss, leaf), *out.metrics.values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("q", (1e-5, -1e-5, 1e-2, -1e-2, 0.999, -0.999, 1.001, -1.001, 5.0, -5.0))  # series, its ends, beyond
def test_k3_does_not_cancel_near_zero(each_backend, q):
    if each_backend == "reference":
        pytest.skip("the reference subtracts in fp32")
    ref = torch.full((1,), q)
    leaf = torch.zeros(1, requires_grad=True)
    out = K.policy_loss(leaf, torch.zeros(1), old_logp=-ref, ref_logp=ref, beta=1.0)
    exact = math.expm1(ref.item())
    k3 = ref.item() ** 2 * sum(ref.item() ** k / math.factorial(k + 2) for k in range(60))
    assert out.metrics["sum/kl_k3"].item() == pytest.approx(k3, rel=2e-6) and out.loss.item() == pytest.approx(k3, rel=2e-6)
    assert torch.autograd.grad(out.loss, leaf)[0].item() == pytest.approx(-exact, rel=2e-6)


def test_a_nan_that_is_not_masked_is_seen_in_the_loss():
    data = batch()
    data["logp"][int(data["mask"].nonzero()[0])] = math.nan
    for loss in ("ppo", "gspo", "cispo"):
        assert torch.isnan(K.policy_loss(**data, loss=loss).loss)
        assert torch.isnan(K.policy_loss(**(data | {"old_logp": None}), loss=loss).loss)


@pytest.mark.parametrize("loss", ("ppo", "gspo", "cispo"))
@pytest.mark.parametrize("entropy_coef", (0.0, 0.1))
def test_loss_and_gradients_of_a_chunk_match_the_reference(operators, loss, entropy_coef):
    data = batch()
    s = PolicySettings(loss, 0.2, 0.28, 3.0, 0.1, "k3", "seq_mean", None, None, None, entropy_coef)
    tokens = token_batch(s, torch.float32, *(data[k] for k in ("advantages", "old_logp", "ref_logp", "mask", "seq_ids"))).rows(
        slice(10, 40)
    )
    rows = data["logp"][10:], torch.rand(30)
    actual, expected = (run(*rows, tokens, s) for run in (partial(loss_and_gradients_by, operators.name), loss_and_gradients))
    for a, b in zip(actual[:3], expected[:3]):
        assert (a is None and b is None) or error(a, b) <= FP32
    assert actual[3].keys() == expected[3].keys()
    for name, value in expected[3].items():
        torch.testing.assert_close(actual[3][name], value.float(), rtol=FP32, atol=FP32)


@pytest.mark.parametrize("agg", ("token", "seq_mean", "seq_sum_norm"))
def test_registered_operators_keep_their_promises(operators, agg):
    data = batch()
    fields = [data[k] for k in ("advantages", "old_logp", "ref_logp", "mask")] + [None, data["seq_ids"], None, None, None, 16.0]
    loss = "gspo" if agg == "token" else "ppo"
    entropy = torch.rand(40)
    options = loss, "k3", agg, 0.8, 1.28, None, 0.1, 0.2
    torch.library.opcheck(operators.policy_loss_forward.default, (data["logp"], entropy, *fields, *options))
    ups = torch.tensor(0.5), torch.tensor(3.0)
    torch.library.opcheck(operators.policy_loss_backward.default, (data["logp"], entropy, *ups, torch.float32, torch.float32))


@pytest.mark.parametrize(("agg", "name"), [("token", "num_tokens"), ("seq_mean", "num_sequences"), ("seq_sum_norm", "num_sequences")])
@pytest.mark.parametrize("count", (0.0, 0))
def test_nothing_left_and_a_global_count_of_zero_is_zero(agg, name, count):
    data = batch()
    data["mask"][:] = False
    leaf = data["logp"].requires_grad_()
    normaliser = torch.tensor(count) if count == 0 and isinstance(count, int) else count
    loss = K.policy_loss(**data, agg=agg, max_length=16.0, **{name: normaliser}).loss
    assert loss == 0 and (torch.autograd.grad(loss, leaf)[0] == 0).all()


def test_a_reference_that_counts_for_nothing_may_be_nan():
    data = batch()
    data["ref_logp"][:] = math.nan
    out = K.policy_loss(**data)
    assert out.loss.isfinite() and out.metrics["sum/kl_ref"].isnan()


def test_a_second_derivative_is_refused():
    data, weight = batch(), torch.ones((), requires_grad=True)
    leaf = data["logp"].requires_grad_()
    with pytest.raises(RuntimeError, match="differentiate twice|not have been used"):
        (first,) = torch.autograd.grad(K.policy_loss(**data).loss * weight, leaf, create_graph=True)
        torch.autograd.grad(first.sum(), weight)


def test_another_number_of_tokens_is_not_compiled_again(operators):
    frames = []
    run = torch.compile(K.policy_loss, fullgraph=True, backend=lambda graph, _: frames.append(graph) or graph.forward)
    for n in (40, 41, 57, 83, 120):
        x = torch.randn(n, requires_grad=True)
        run(x, torch.randn(n)).loss.backward()
    assert len(frames) == 2  # the first size, and any other


def test_the_operator_traces_without_a_graph_break(operators):
    data, results = batch(), []
    fields = {name: data[name] for name in ("old_logp", "ref_logp", "mask")}
    for run in (K.policy_loss, torch.compile(K.policy_loss, fullgraph=True, backend="aot_eager")):
        leaves = data["logp"].clone().requires_grad_(), torch.ones(40).requires_grad_()
        out = run(leaves[0], data["advantages"], entropy=leaves[1], entropy_coef=0.1, beta=0.1, **fields)
        results.append((out.loss, *torch.autograd.grad(out.loss * 3, leaves), *out.metrics.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_half_precision_logp_is_computed_in_fp32():
    data = batch()
    leaf = data["logp"].bfloat16().requires_grad_()
    out = K.policy_loss(leaf, data["advantages"], old_logp=data["old_logp"])
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and leaf.grad.dtype == torch.bfloat16


def test_a_maximum_leaves_masked_values_out():
    values, mask = torch.tensor([1.0, math.nan, 7.0]), torch.tensor([True, False, False])
    assert masked_max(values, mask) == 1 and masked_max(values, ~mask & mask) == 0


def test_metrics_of_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="mean/x"):
        K.combine_metrics([{"mean/x": torch.zeros(())}])


def test_errors_name_what_was_given_and_what_was_expected():
    x, ids = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    cases = (
        ({"loss": "reinforce"}, "loss: given 'reinforce', expected one of"),
        ({"agg": "mean"}, "agg: given 'mean'"),
        ({"kl": "k4"}, "kl: given 'k4'"),
        ({"beta": 0.1}, r"ref_logp: given None, expected \[N\] because beta is 0.1"),
        ({"beta": -0.1}, "beta: given -0.1, expected at least 0"),
        ({"loss": "gspo"}, r"seq_ids: given None, expected \[N\] because loss is 'gspo'"),
        ({"agg": "seq_mean"}, "seq_ids: given None"),
        ({"agg": "seq_sum_norm", "seq_ids": ids}, "max_length: given None"),
        ({"dual_clip": 0.5}, "dual_clip: given 0.5, expected more than 1, or None"),
        ({"clip_low": -0.1}, "clip_low: given -0.1"),
        ({"clip_high": -0.1}, "clip_high: given -0.1"),
        ({"mask": x}, r"mask: given torch.float32, expected one of \['bool'\]"),
        ({"old_logp": x[:3]}, r"old_logp: given shape \(3,\), expected shape \(4,\)"),
        ({"entropy_coef": 0.1}, r"entropy: given None, expected \[N\] because entropy_coef is 0.1"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            K.policy_loss(x, x, **options)
