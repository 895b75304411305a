"""flow_policy_loss against the oracle: Flow-GRPO, GRPO-Guard, DPPO; masks, micro-batches, metrics."""

import itertools
import math

import pytest
import torch

import aot_fast.kernels as K

from . import oracle
from .oracle import FP32, error

pytestmark = pytest.mark.usefixtures("each_backend")

CLIP = {"grpo": 1e-2, "guard": 1e-3, "dppo": None}
GRID = list(itertools.product(("grpo", "guard", "dppo"), (0.0, 0.04)))


def batch(n=24, seed=0):
    """Log-ratios of the size of the clip range; advantages beyond 5; drifts on both sides of tau."""
    generator = torch.Generator().manual_seed(seed)
    logp = torch.randn(n, generator=generator)
    std = 0.1 + torch.rand(n, generator=generator)
    return {
        "logp": logp,
        "old_logp": logp - 0.01 * torch.randn(n, generator=generator),
        "advantages": 3 * torch.randn(n, generator=generator),
        "kl": torch.rand(n, generator=generator),
        "drift": 2e-5 * std.square() * 2 * torch.rand(n, generator=generator),
        "std": std,
        "dt": -0.05 - 0.1 * torch.rand(n, generator=generator),
        "mask": torch.rand(n, generator=generator) > 0.2,
    }


@pytest.mark.parametrize(("variant", "beta"), GRID)
@pytest.mark.parametrize("count", (None, 17.0))
def test_values_and_gradients_match_the_oracle(variant, beta, count):
    data = batch()
    names = ("logp", "kl", "drift")
    leaves = [data[name].clone().requires_grad_() for name in names]
    fields = data | dict(zip(names, leaves))
    out = K.flow_policy_loss(**fields, clip=CLIP[variant], variant=variant, beta=beta, count=count)
    exact = [oracle.leaf(data[name]) for name in names]
    rest = [data[name].double() for name in ("old_logp", "advantages")]
    more = {"std": data["std"].double(), "dt": data["dt"].double(), "beta": beta, "count": count}
    value, dropped = oracle.flow_policy_loss(
        exact[0], *rest, data["mask"].tolist(), CLIP[variant], variant, kl=exact[1], drift=exact[2], **more
    )
    assert error(out.loss, value) <= FP32
    ours = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    for name, mine, truth in zip(names, ours, torch.autograd.grad(value, exact, allow_unused=True)):
        mine, truth = (torch.zeros(24) if g is None else g for g in (mine, truth))
        # u |d| against 1 in the ratio; logp - old itself loses nothing (both are exact), so FP32 holds although the log-ratios are small
        assert error(mine, truth) <= FP32, name
        assert (mine[~data["mask"]] == 0).all()
    if variant == "dppo":
        assert out.metrics["count/dropped"] == dropped > 0
        assert dropped < data["mask"].sum()


def test_metrics():
    data = batch()
    out = K.flow_policy_loss(**data, clip=1e-2, beta=0.1).metrics
    on = data["mask"]
    d = (data["logp"].double() - data["old_logp"].double())[on]
    a = data["advantages"].double()[on].clamp(-5, 5)
    r = d.exp()
    exact = {
        "count/samples": on.sum(),
        "count/masked": (~on).sum(),
        "sum/ratio": r.sum(),
        "max/ratio_deviation": (r - 1).abs().max(),
        "count/clip_low": ((a < 0) & (r < 0.99)).sum(),
        "count/clip_high": ((a > 0) & (r > 1.01)).sum(),
        "sum/kl_k1": -d.sum(),
        "sum/kl_k3": (d.exp() - 1 - d).sum(),
        "sum/kl": data["kl"].double()[on].sum(),
        "sum/drift": data["drift"].double()[on].sum(),
        "sum/advantage": a.sum(),
        "sum/advantage_squared": a.square().sum(),
        "count/advantage_clipped": (data["advantages"][on].abs() > 5).sum(),
        "count/zero_coefficient": ((a < 0) & (r < 0.99)).sum() + ((a > 0) & (r > 1.01)).sum(),
    }
    assert out.keys() == exact.keys()
    for name, value in exact.items():
        # a ratio is off by u against 1, not against ratio - 1
        assert out[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert exact["count/clip_low"] > 0 and exact["count/clip_high"] > 0 and exact["count/advantage_clipped"] > 0


@pytest.mark.parametrize(("variant", "beta"), GRID)
@pytest.mark.parametrize("rubbish", (math.nan, math.inf, -300.0))
def test_what_lies_under_the_mask_does_not_matter(variant, beta, rubbish):
    clean = batch()
    dirty = {k: v if k == "mask" else torch.where(clean["mask"], v, rubbish) for k, v in clean.items()}
    results = []
    for data in (clean, dirty):
        leaves = [data[k].clone().requires_grad_() for k in ("logp", "kl", "drift")]
        out = K.flow_policy_loss(**(data | dict(zip(("logp", "kl", "drift"), leaves))), clip=CLIP[variant], variant=variant, beta=beta)
        gradients = torch.autograd.grad(out.loss, leaves, allow_unused=True)
        results.append([out.loss, *(g for g in gradients if g is not None), *out.metrics.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_everything_masked_is_an_attached_zero():
    leaf = torch.randn(4, requires_grad=True)
    out = K.flow_policy_loss(leaf, torch.zeros(4), torch.ones(4), clip=1e-4, mask=torch.zeros(4, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    assert out.loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize(("variant", "beta"), GRID)
def test_micro_batches_equal_one_batch_and_the_upstream_scalar_scales(variant, beta):
    data = batch()
    data["logp"].requires_grad_()
    options = {"clip": CLIP[variant], "variant": variant, "beta": beta, "count": torch.tensor(24.0)}
    whole = K.flow_policy_loss(**data, **options)
    (want,) = torch.autograd.grad(whole.loss, data["logp"], retain_graph=True)
    (scaled,) = torch.autograd.grad(-2 * whole.loss, data["logp"], retain_graph=True)
    assert torch.equal(scaled, -2 * want) and torch.equal(torch.autograd.grad(whole.loss, data["logp"])[0], want)
    parts = [K.flow_policy_loss(**{k: v[rows] for k, v in data.items()}, **options) for rows in (slice(0, 7), slice(7, 24))]
    total = parts[0].loss + parts[1].loss
    torch.testing.assert_close(total, whole.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.autograd.grad(total, data["logp"])[0], want, rtol=1e-6, atol=0)
    combined = K.combine_metrics([p.metrics for p in parts])
    for name, value in whole.metrics.items():
        torch.testing.assert_close(combined[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_ratio_one_is_the_policy_gradient():
    logp = torch.randn(6, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 7.0, -9.0, 0.0, 2.0])
    K.flow_policy_loss(logp, logp.detach(), advantages, clip=1e-4).loss.backward()
    torch.testing.assert_close(logp.grad, -advantages.clamp(-5, 5) / 6)


def test_a_deterministic_sample_of_a_guarded_batch_has_ratio_one():
    ones = torch.ones(2)
    std = torch.tensor([0.5, 0.0])
    out = K.flow_policy_loss(torch.zeros(2), torch.zeros(2), ones, clip=2e-6, variant="guard", drift=ones, std=std, dt=-0.1)
    assert torch.isfinite(out.loss) and out.metrics["max/ratio_deviation"].item() == pytest.approx(math.exp(1) - 1, rel=1e-6)


@pytest.mark.parametrize("variant", ("grpo", "guard", "dppo"))
def test_many_samples_in_any_layout(variant):
    data = batch(1100)  # more than two steps of a kernel
    shared = {"std": torch.tensor(0.3), "dt": torch.tensor(-0.1, dtype=torch.float64)}
    apart = {k: torch.stack([t, t], dim=1)[:, 0] for k, t in data.items() if k not in shared}
    plain = data | {k: t.float().expand(1100).clone() for k, t in shared.items()}
    options = {"clip": CLIP[variant], "variant": variant, "beta": 0.02}
    results = []
    for fields, count in ((apart | shared, torch.tensor(900)), (plain, 900.0)):
        leaf = fields["logp"].detach().requires_grad_()
        out = K.flow_policy_loss(**(fields | {"logp": leaf}), count=count, **options)
        results.append((out.loss, torch.autograd.grad(out.loss, leaf)[0], *out.metrics.values()))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    rest = [data[name].double() for name in ("old_logp", "advantages")]
    exact = oracle.leaf(data["logp"])
    more = {name: plain[name].double() for name in ("kl", "drift", "std", "dt")} | {"beta": 0.02, "count": 900.0}
    value, _ = oracle.flow_policy_loss(exact, *rest, data["mask"].tolist(), CLIP[variant], variant, **more)
    assert error(results[0][0], value) <= FP32
    assert error(results[0][1], torch.autograd.grad(value, exact)[0]) <= FP32


def test_half_precision_inputs_and_no_samples():
    data = {k: t if k == "mask" else t.bfloat16() for k, t in batch().items()}
    leaf = data["logp"].requires_grad_()
    out = K.flow_policy_loss(**data, clip=1e-2)
    wide = K.flow_policy_loss(**{k: t.detach() if k == "mask" else t.detach().float() for k, t in data.items()}, clip=1e-2)
    assert out.loss.dtype == torch.float32 and error(out.loss, wide.loss) <= FP32
    assert torch.autograd.grad(out.loss, leaf)[0].dtype == torch.bfloat16
    none = torch.zeros(0, requires_grad=True)
    out = K.flow_policy_loss(none, none, none, clip=1e-2)
    assert out.loss == 0 and torch.autograd.grad(out.loss, none)[0].shape == (0,) and out.metrics["count/samples"] == 0


def test_a_nan_that_is_not_masked_shows():
    data = batch()
    data["logp"][data["mask"].nonzero()[0]] = math.nan
    out = K.flow_policy_loss(**data, clip=1e-2)
    assert out.loss.isnan() and out.metrics["sum/ratio"].isnan() and out.metrics["max/ratio_deviation"].isnan()


def test_the_registered_operator_keeps_its_promises(operators):
    data = batch()
    fields = [data[name] for name in ("logp", "old_logp", "advantages", "kl", "drift", "std", "dt", "mask")]
    for variant, number, fixed in (("guard", None, None), ("dppo", torch.tensor(9), None), ("grpo", None, 9.0)):
        arguments = (*fields, number, fixed, 1e-2, 0.1, 1e-5, 5.0, variant)
        torch.library.opcheck(operators.flow_policy_loss.default, arguments)


def test_errors_name_what_was_given_and_what_was_expected():
    x = torch.zeros(3)
    cases = (
        ({"clip": None}, "clip: given None, expected more than 0 for variant 'grpo'"),
        ({"variant": "nft"}, "variant: given 'nft', expected one of"),
        ({"beta": 0.1}, r"kl: given None, expected \[B\] because beta is 0.1"),
        ({"variant": "guard"}, "drift: given None, expected a value for variant 'guard'"),
        ({"variant": "guard", "drift": x}, "std: given None"),
        ({"variant": "guard", "drift": x, "std": 0.1}, "dt: given None"),
        ({"variant": "dppo", "std": 0.1}, "drift: given None"),
        ({"std": x[:2]}, r"std: given shape \(2,\)"),
        ({"adv_clip": 0.0}, "adv_clip: given 0.0"),
        ({"tau": -1.0}, "tau: given -1.0"),
        ({"kl": x[:1]}, r"kl: given shape \(1,\)"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            K.flow_policy_loss(x, x, x, **({"clip": 1e-4} | options))
