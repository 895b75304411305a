"""flow_step, flow_logp, guidance and the dynamics against the oracle; replay to the bit."""

import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from aot_fast.kernels.flow_dynamics import _on_device

import aot_fast.kernels as K
from aot_fast.kernels import flow_kernels_triton, philox_triton

from . import oracle
from .oracle import FP32, error

pytestmark = pytest.mark.usefixtures("each_backend")

# name, sigma, sigma_next, eta, sigma_max: the first step (sigma 1), a middle one, a late one; every dynamics
STEPS = (
    ("flow_sde", 1.0, 0.9, 1.0, 0.95),
    ("flow_sde", 0.7, 0.6, 0.7, 0.95),  # sigma_max is for sigma = 1 only
    ("flow_sde", 0.2, 0.05, 1.0, None),
    ("dance", 1.0, 0.9, 0.3, None),
    ("dance", 0.5, 0.3, 0.3, None),
    ("cps", 1.0, 0.9, 0.7, None),
    ("cps", 0.5, 0.3, 1.0, None),
)
DETERMINISTIC = (
    ("ode", 0.7, 0.6, 1.0, None),
    ("flow_sde", 0.7, 0.6, 0.0, None),
    ("cps", 0.7, 0.6, 0.0, None),
    ("dance", 0.7, 0.0, 0.3, None),
    ("flow_sde", 0.1, 0.0, 1.0, None),
    ("cps", 0.1, 0.0, 0.7, None),
)
# cps_logp only means something for cps
SCORED = [(*step, "published") for step in STEPS + DETERMINISTIC] + [
    (*step, "gaussian") for step in STEPS + DETERMINISTIC if step[0] == "cps"
]
SHAPE = (3, 5, 8)


def latents(dtype=torch.float32, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = ("x", "v", "noise", "v_uncond", "v_ref", "v_old")
    return {name: torch.randn(shape, generator=generator).to(dtype) for name in names}


@pytest.mark.parametrize(("dynamics", "s", "s_next", "eta", "s_max"), STEPS + DETERMINISTIC)
def test_coefficients_match_the_oracle(dynamics, s, s_next, eta, s_max):
    got = K.flow_coefficients(s, s_next, dynamics=dynamics, eta=eta, sigma_max=s_max, batch=2)
    for value, exact in zip(got, oracle.coefficients(dynamics, s, s_next, eta, s_max)):
        assert value.dtype == torch.float64
        assert value.tolist() == pytest.approx([exact] * 2, rel=1e-14, abs=1e-15)
    tensors = [torch.tensor([v, v], dtype=torch.float64, device="cpu") for v in (s, s_next, eta)]
    again = K.flow_coefficients(*tensors[:2], dynamics=dynamics, eta=tensors[2], sigma_max=s_max, batch=2)
    assert all(torch.equal(a, b) for a, b in zip(got, again))
    values = (torch.tensor([v, v], dtype=torch.float64, device="cpu") for v in (s, s_next, eta, s_max or 0.5))
    on_device = _on_device(*values, dynamics, dynamics == "flow_sde" and s_max is None)
    assert all(torch.equal(a, b) for a, b in zip(got, on_device))  # as a GPU does it, but on the host


def test_eta_zero_and_the_last_step_are_the_ode():
    for dynamics in ("flow_sde", "dance", "cps"):
        for s_next, eta in ((0.6, 0.0), (0.0, 0.7)):
            got = K.flow_coefficients(0.7, s_next, dynamics=dynamics, eta=eta)
            assert all(torch.equal(a, b) for a, b in zip(got, K.flow_coefficients(0.7, s_next, dynamics="ode", eta=1.0)))


@pytest.mark.parametrize(("dynamics", "s", "s_next", "eta", "s_max", "cps_logp"), SCORED)
@pytest.mark.parametrize("kl", ("exact", "flow_grpo"))
@pytest.mark.parametrize("guidance", (None, (1.0, True), (4.0, True), (4.0, False)))
def test_scores_and_gradients_match_the_oracle(dynamics, s, s_next, eta, s_max, cps_logp, kl, guidance):
    data = latents()
    v, u = data["v"].requires_grad_(), data["v_uncond"].requires_grad_()
    guide = {} if guidance is None else {"v_uncond": u, "guidance": guidance[0], "rescale": guidance[1]}
    step_options = {"dynamics": dynamics, "eta": eta, "sigma_max": s_max, "cps_logp": cps_logp}
    step = K.flow_step(data["x"], v, s, s_next, noise=data["noise"], **step_options, **guide)
    refs = {"v_ref": data["v_ref"], "v_old": data["v_old"]}
    out = K.flow_logp(data["x"], v, step.x_next, s, s_next, kl=kl, **refs, **step_options, **guide)
    upstream = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, -1.0], [0.7, -0.2, 1.5]])
    leaves = (v,) if guidance is None else (v, u)
    gradients = torch.autograd.grad(sum((w * t).sum() for w, t in zip(upstream, out)), leaves)

    exact_leaves = [oracle.leaf(t) for t in leaves]
    a, b, std, _ = coefficients = oracle.coefficients(dynamics, s, s_next, eta, s_max)
    published = dynamics == "cps" and cps_logp == "published"
    total = 0.0
    for i in range(3):
        velocity = exact_leaves[0][i] if guidance is None else oracle.guided(exact_leaves[0][i], exact_leaves[1][i], *guidance)
        mean = a * data["x"][i].double() + b * velocity
        assert error(step.x_next[i], mean + std * data["noise"][i].double()) <= FP32
        rows = (data["x"][i].double(), velocity, step.x_next[i].double(), coefficients, published, kl == "flow_grpo")
        scores = oracle.flow_score(*rows, data["v_ref"][i].double(), data["v_old"][i].double())
        for name, mine, truth in zip(("logp", "kl", "drift"), out, scores):
            assert mine[i].item() == pytest.approx(truth.item(), rel=FP32, abs=FP32), name
        total = total + sum(upstream[k, i].double() * scores[k] for k in range(3))
    for mine, truth in zip(gradients, torch.autograd.grad(total, exact_leaves)):
        assert error(mine, truth) <= FP32


@pytest.mark.parametrize(("dynamics", "s", "s_next", "eta", "s_max"), DETERMINISTIC)
def test_a_deterministic_step_ignores_noise_and_scores_zero(dynamics, s, s_next, eta, s_max):
    data = latents()
    v = data["v"].requires_grad_()
    options = {"dynamics": dynamics, "eta": eta, "sigma_max": s_max}
    wild = K.flow_step(data["x"], v, s, s_next, noise=torch.full(SHAPE, math.nan), **options)
    calm = K.flow_step(data["x"], v, s, s_next, **options)
    assert torch.equal(wild.x_next, calm.x_next) and (wild.logp == 0).all()
    out = K.flow_logp(data["x"], v, wild.x_next + 1, s, s_next, v_ref=torch.full(SHAPE, math.inf), **options)
    (gradient,) = torch.autograd.grad(out.logp.sum() + out.kl.sum(), v)
    assert (out.logp == 0).all() and (out.kl == 0).all() and (gradient == 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("storage", (None, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("case", STEPS)
def test_replay_has_the_bits_of_the_rollout(dtype, storage, case, each_backend):
    dynamics, s, s_next, eta, s_max = case
    # 4,480 elements: more than a block of the fixed-order sum; 1,088: more than a tile of Triton's, whose interpreter is slow
    data = latents(dtype, (3, 70, 64) if each_backend != "triton" else (3, 17, 64))
    options = {"dynamics": dynamics, "eta": eta, "sigma_max": s_max, "v_uncond": data["v_uncond"], "guidance": 3.0}
    step = K.flow_step(data["x"], data["v"], s, s_next, seeds=torch.tensor([5, -7, 2**60]), storage_dtype=storage, **options)
    assert step.x_next.dtype == (storage or dtype)
    v = data["v"].clone().requires_grad_()
    replay = K.flow_logp(data["x"], v, step.x_next, s, s_next, **options)
    assert torch.equal(replay.logp, step.logp)
    replay.logp.sum().backward()
    assert v.grad.dtype == dtype and v.grad.abs().sum() > 0
    # Guidance is already in v_ref and v_old: for those of the same weights, KL and drift are zero.
    guided = K.guided_velocity(data["v"], data["v_uncond"], guidance=3.0)
    same = K.flow_logp(data["x"], data["v"], step.x_next, s, s_next, v_ref=guided, v_old=guided, **options)
    assert (same.kl == 0).all() and (same.drift == 0).all()


# below a block, just above one, three blocks; one tile with padding, five tiles, two strips of Triton's
@pytest.mark.parametrize("shape", ((6, 3, 7), (6, 65, 64), (6, 130, 64)))
def test_a_sample_has_the_same_bits_alone_in_a_batch_permuted_and_on_any_thread_count(shape):
    data = latents(shape=shape)
    sigma, sigma_next = torch.linspace(1.0, 0.5, 6), torch.linspace(0.9, 0.3, 6)
    seeds = torch.arange(6) * 1_000_003 - 7

    def run(index):
        some = {k: t[index].clone() for k, t in data.items()}
        v, u = some["v"].requires_grad_(), some["v_uncond"].requires_grad_()
        options = {"eta": 0.8, "sigma_max": 0.95, "v_uncond": u, "guidance": 2.5, "dynamics": "flow_sde"}
        scalars = sigma[index], sigma_next[index]
        step = K.flow_step(some["x"], v, *scalars, seeds=seeds[index], **options)
        out = K.flow_logp(some["x"], v, step.x_next, *scalars, v_ref=some["v_ref"], v_old=some["v_old"], **options)
        assert torch.equal(step.logp, out.logp)
        gradients = torch.autograd.grad(out.logp.sum() + out.kl.sum() + out.drift.sum(), (v, u))
        parts = (step.x_next, step.logp, out.logp, out.kl, out.drift, *gradients)
        return torch.cat([p.detach().flatten(1) if p.dim() > 1 else p.detach()[:, None] for p in parts], dim=1)

    whole = run(torch.arange(6))
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert torch.equal(run(order), whole[order])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(run(torch.arange(6)), whole)
        assert torch.equal(torch.cat([run(torch.tensor([i])) for i in range(6)]), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))  # a thread holds 4 neighbouring elements, or 8
def test_noise_from_seeds_equals_stored_noise(dtype, each_backend):
    data = latents(dtype)
    seeds = torch.tensor([1, 2, 3])
    reference = K.philox_normal(seeds, 40)
    normals = reference if each_backend in ("reference", "csrc") else philox_triton.philox_normal_triton(seeds, 40)
    assert (normals - reference).abs().max() <= 1e-6
    drawn = K.flow_step(data["x"], data["v"], 0.7, 0.6, eta=1.0, seeds=seeds)
    given = K.flow_step(data["x"], data["v"], 0.7, 0.6, eta=1.0, noise=normals.view(SHAPE))
    assert torch.equal(drawn.x_next, given.x_next) and torch.equal(drawn.logp, given.logp)


@pytest.mark.parametrize("channels", (3, 7))  # tokens that no block of four normals starts with
def test_noise_from_seeds_of_whole_tokens(channels, each_backend):
    shape = (2, 1400 // channels if each_backend != "triton" else 40, channels)
    data, seeds = latents(shape=shape), torch.tensor([1, 2])
    guide = {"eta": 1.0, "v_uncond": data["v_uncond"], "guidance": 3.0}
    count = shape[1] * channels
    normals = K.philox_normal(seeds, count)
    drawn = K.flow_step(data["x"], data["v"], 0.7, 0.6, seeds=seeds, **guide)
    given = K.flow_step(data["x"], data["v"], 0.7, 0.6, noise=normals.view(shape), **guide)
    torch.testing.assert_close(drawn.x_next, given.x_next, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_the_log_probability_belongs_to_the_stored_latent(dtype, each_backend):
    if each_backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bf16")
    data = latents(dtype)
    step = K.flow_step(data["x"], data["v"], 0.7, 0.6, eta=1.0, noise=data["noise"])
    unrounded = K.flow_step(data["x"], data["v"], 0.7, 0.6, eta=1.0, noise=data["noise"], storage_dtype=torch.float32)
    assert torch.equal(step.x_next, unrounded.x_next.to(dtype)) and not torch.equal(step.logp, unrounded.logp)
    wide = K.flow_step(data["x"], data["v"], 0.7, 0.6, eta=1.0, noise=data["noise"], storage_dtype=torch.float64)
    assert torch.equal(wide.x_next, unrounded.x_next.double()) and torch.equal(wide.logp, unrounded.logp)


def test_any_layout_of_latents_and_of_upstream_gradients():
    generator = torch.Generator().manual_seed(3)
    chain, velocities = (torch.randn(3, 2, 5, 8, generator=generator) for _ in range(2))  # B, steps, tokens, channels
    options = {"dynamics": "flow_sde", "eta": 0.8, "v_old": velocities[:1, 1].expand(3, 5, 8)}
    plain = [t.contiguous() for t in (chain[:, 0], velocities[:, 0], chain[:, 1])]
    weights = torch.randn(3, 1, generator=generator)
    results = []
    for x, v, x_next in ((chain[:, 0], velocities[:, 0], chain[:, 1]), plain, [t.mT.contiguous().mT for t in plain]):
        v = v.detach().requires_grad_()
        out = K.flow_logp(x, v, x_next, 0.7, 0.6, **options)
        for use in (out.logp.mean() + out.drift.sum(), (out.drift[:, None] * weights.expand(3, 4)).sum(), -2 * out.logp @ weights[:, 0]):
            (gradient,) = torch.autograd.grad(use, v, retain_graph=True)
            assert torch.equal(torch.autograd.grad(use, v, retain_graph=True)[0], gradient)
            results.append((out.logp, gradient))
    for k in range(3):
        assert all(torch.equal(a, b) for other in (k + 3, k + 6) for a, b in zip(results[k], results[other]))
    (once,) = torch.autograd.grad(K.flow_logp(plain[0], v, plain[2], 0.7, 0.6, **options).logp.sum(), v)
    torch.testing.assert_close(results[2][1], -2 * weights[:, :, None] * once)


@pytest.mark.parametrize("shape", ((1, 1, 1), (2, 3, 1), (1, 1, 3000), (2, 0, 4)))  # one number; one channel; more than a tile; none
def test_degenerate_shapes(shape):
    data = latents(shape=shape)
    v, u = data["v"].requires_grad_(), data["v_uncond"].requires_grad_()
    options = {"eta": 1.0, "v_uncond": u, "guidance": 3.0, "dynamics": "flow_sde"}
    step = K.flow_step(data["x"], v, 0.7, 0.6, seeds=torch.arange(shape[0]), **options)
    out = K.flow_logp(data["x"], v, step.x_next, 0.7, 0.6, v_ref=data["v_ref"], **options)
    gradients = torch.autograd.grad(out.logp.sum() + out.kl.sum(), (v, u))
    exact = [oracle.leaf(t) for t in (v, u)]
    coefficients = oracle.coefficients("flow_sde", 0.7, 0.6, 1.0, None)
    total = sum(t.sum() for t in exact)
    for i in range(shape[0] if v.numel() else 0):
        velocity = oracle.guided(exact[0][i], exact[1][i], 3.0, True)
        rows = (data["x"][i].double(), velocity, step.x_next[i].double(), coefficients, False, False)
        logp, kl, _ = oracle.flow_score(*rows, data["v_ref"][i].double())
        assert out.logp[i].item() == pytest.approx(logp.item(), rel=FP32, abs=FP32)
        total = total + logp + kl
    for mine, truth in zip(gradients, torch.autograd.grad(total, exact)):
        assert (mine - (truth - 1)).norm() <= FP32 * (truth - 1).norm() + 1e-6


def test_only_the_velocity_that_asks_gets_a_gradient():
    data = latents()
    for asks, other in (("v", "v_uncond"), ("v_uncond", "v")):
        leaf = data[asks].clone().requires_grad_()
        velocities = {asks: leaf, other: data[other]}
        out = K.flow_logp(
            data["x"], velocities["v"], data["noise"], 0.7, 0.6, dynamics="dance", eta=0.5, v_uncond=velocities["v_uncond"], guidance=2.0
        )
        assert torch.autograd.grad(out.logp.sum(), leaf)[0].abs().sum() > 0


def test_a_second_derivative_is_refused(each_backend):
    data, weight = latents(), torch.ones(3, requires_grad=True)
    v = data["v"].requires_grad_()
    logp = K.flow_logp(data["x"], v, data["noise"], 0.7, 0.6, dynamics="dance", eta=0.5).logp
    with pytest.raises(RuntimeError, match="differentiate twice|not have been used"):
        (first,) = torch.autograd.grad((logp * weight).sum(), v, create_graph=True)
        torch.autograd.grad(first.sum(), weight)


def test_registered_operators_keep_their_promises(operators):
    x, v, u, r = torch.randn(4, 2, 3, 8)
    step = list(K.flow_coefficients(0.7, 0.6, dynamics="flow_sde", eta=0.7, batch=2))
    step = [c.to(x.device) for c in step]
    calls = (
        (operators.flow_step, (x, v, u, None, torch.tensor([3, 4]), step, 3.0, True, False, torch.bfloat16)),
        (operators.flow_logp, (x, v, None, x, r, None, step, 3.0, False, False, True)),
        (
            operators.flow_logp_gradient,
            (x, v, u, x, r, r, step, torch.ones(2), None, torch.ones(1).expand(2), 3.0, True, False, True),
        ),
        (operators.guided_velocity, (v, u, 2.0, True)),
        (operators.guided_velocity_gradient, (v, u, r, 2.0, True)),
    )
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments)


def test_the_operators_trace_whole(each_backend):
    data = latents()
    seeds = None if each_backend == "reference" else torch.arange(3)
    guide = {"v_uncond": data["v_uncond"], "guidance": 3.0, "eta": 0.7}

    def run(v):
        rollout = K.flow_step(data["x"], v, 0.7, 0.6, noise=None if seeds is not None else data["noise"], seeds=seeds, **guide)
        out = K.flow_logp(data["x"], v, rollout.x_next, 0.7, 0.6, dynamics="flow_sde", v_ref=data["v_ref"], **guide)
        return rollout.x_next, rollout.logp, out.logp, out.kl

    v = data["v"].requires_grad_()
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        outputs = function(v)
        results.append((*outputs, *torch.autograd.grad(outputs[2].sum() + outputs[3].sum(), v)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@triton.jit
def as_fp32_kernel(values, out):
    index = tl.program_id(0)
    tl.store(out + index, flow_kernels_triton.as_fp32(values, index))


def test_kernels_read_fp64_scalars_as_fp32(each_backend):
    if each_backend in ("reference", "csrc"):
        pytest.skip("for Triton")
    tie = 1 + 2.0**-24
    values = [
        0.0,
        -0.0,
        1.0,
        -math.pi,
        tie,
        tie + 2.0**-40,
        1 + 3 * 2.0**-24,
        3.5e38,
        3.4028235677973366e38,
        1.2e-38,
        1e-300,
        math.inf,
        -math.inf,
    ]
    values = torch.tensor([*values, math.nan], dtype=torch.float64)
    out = torch.empty(len(values))
    as_fp32_kernel[(len(values),)](values.view(torch.int64), out)
    torch.testing.assert_close(out, values.float(), rtol=0, atol=0, equal_nan=True)


def test_per_sample_scalars_and_mixed_rows():
    data = latents()
    sigma, sigma_next, eta = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.9, 0.4, 0.0]), torch.tensor([1.0, 0.0, 1.0])
    out = K.flow_step(data["x"], data["v"], sigma, sigma_next, eta=eta, sigma_max=0.95, noise=data["noise"])
    assert out.logp[0] != 0 and (out.logp[1:] == 0).all()
    for i in range(3):
        one = [t[i : i + 1] for t in (data["x"], data["v"])]
        scalars = sigma[i].item(), sigma_next[i].item()
        alone = K.flow_step(*one, *scalars, eta=eta[i].item(), sigma_max=0.95, noise=data["noise"][i : i + 1])
        assert torch.equal(alone.x_next[0], out.x_next[i]) and torch.equal(alone.logp[0], out.logp[i])


def test_guidance_keeps_the_norm_of_the_conditional_velocity():
    data = latents()
    out = K.guided_velocity(data["v"], data["v_uncond"], guidance=4.0)
    torch.testing.assert_close(out.norm(dim=-1), data["v"].norm(dim=-1), rtol=1e-6, atol=0)


def test_guidance_of_an_empty_token_is_zero_and_finite():
    v, u = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    v[0, 1], u[0, 1] = 3.0, 4.5  # the mix u + 3 (v - u) is zero here although both are not
    v.requires_grad_(), u.requires_grad_()
    out = K.guided_velocity(v, u, guidance=3.0)
    gradients = torch.autograd.grad(out.sum(), (v, u))
    assert (out == 0).all() and all(torch.isfinite(g).all() for g in gradients)


def test_an_empty_batch():
    empty = torch.zeros(0, 4, 8, requires_grad=True)
    out = K.flow_step(empty, empty, 0.7, 0.6, eta=1.0, seeds=torch.zeros(0, dtype=torch.int64))
    assert out.x_next.shape == (0, 4, 8) and out.logp.shape == (0,)


def test_nothing_is_differentiable_but_the_velocities():
    data = {k: t.requires_grad_() for k, t in latents().items()}
    step = K.flow_step(data["x"], data["v"], 0.7, 0.6, eta=1.0, noise=data["noise"])
    assert not step.x_next.requires_grad
    out = K.flow_logp(data["x"], data["v"], step.x_next, 0.7, 0.6, dynamics="flow_sde", eta=1.0, v_ref=data["v_ref"], v_old=data["v_old"])
    sum(t.sum() for t in (*out, step.logp)).backward()
    assert [name for name, t in data.items() if t.grad is not None] == ["v"]


def test_errors_name_what_was_given_and_what_was_expected():
    d = latents()
    x, v, n = d["x"], d["v"], d["noise"]

    def step(*scalars, **options):
        return lambda: K.flow_step(x, v, *(scalars or (0.7, 0.6)), **({"eta": 1.0, "noise": n} | options))

    cases = (
        (step(1.0, 0.9), "sigma_max: given None, expected the schedule's second sigma"),
        (step(torch.tensor([1.0, 0.8, 0.8], device="cpu"), 0.5), "sigma_max: given None"),
        (step(1.0, 0.9, sigma_max=1.0), r"sigma_max: given \[1.0, 1.0, 1.0\]"),
        (step(0.6, 0.7), r"sigma_next: given \[0.7, 0.7, 0.7\], expected values in \[0, sigma\]"),
        (step(1.2, 0.7), r"sigma: given \[1.2, 1.2, 1.2\], expected values in \(0, 1\]"),
        (step(eta=-1.0), "eta: given"),
        (step(dynamics="sde"), "dynamics: given 'sde', expected one of"),
        (step(cps_logp="exact"), "cps_logp: given 'exact'"),
        (step(noise=None), "noise: given None, expected noise or seeds for dynamics 'flow_sde'"),
        (step(seeds=torch.arange(3)), "noise: given noise and seeds, expected one of them"),
        (step(noise=None, seeds=torch.arange(4)), r"seeds: given shape \(4,\), expected shape \(3,\)"),
        (step(noise=None, seeds=torch.arange(3).int()), "seeds: given torch.int32"),
        (step(torch.tensor([0.7, 0.6]), 0.5), r"sigma: given shape \(2,\), expected a float, or shape \(\) or \(3,\)"),
        (step(storage_dtype=torch.int8), "storage_dtype: given torch.int8"),
        (lambda: K.flow_step(x, v[:, :4], 0.7, 0.6, eta=1.0, noise=n), r"v: given shape \(3, 4, 8\), expected shape \(3, 5, 8\)"),
        (lambda: K.flow_logp(x, v, x, 0.7, 0.6, dynamics="cps", eta=1.0, kl="k3"), "kl: given 'k3'"),
        (lambda: K.guided_velocity(x[0], v[0], guidance=2.0), r"v: given shape \(5, 8\).*expected \[B, tokens, channels\]"),
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_sigma_one_is_only_refused_where_it_divides_by_zero():
    d = latents()
    for dynamics, s_max in itertools.product(("dance", "cps", "ode"), (None, 0.9)):
        assert torch.isfinite(
            K.flow_step(d["x"], d["v"], 1.0, 0.9, dynamics=dynamics, eta=0.5, sigma_max=s_max, noise=d["noise"]).logp
        ).all()
