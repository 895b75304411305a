"""The C++ operators: built where a compiler is, the schemas of the Triton operators, the same bits for any number of threads, every
instruction set. That they are right is what the other files here show of every backend."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from aot_fast.kernels.policy_loss import PolicySettings

import aot_fast.kernels as K
from aot_fast.kernels import dispatch, native

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = PolicySettings("ppo", 0.2, 0.28, 3.0, 0.0, "k3", "token", None, None, None, 0.0)
needs_csrc = pytest.mark.skipif(native.problem() is not None, reason=f"csrc: {native.problem()}")


def test_csrc_is_built_where_a_compiler_is():
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    assert native.problem() is None


@needs_csrc
def test_schemas_are_those_of_the_triton_operators():
    pytest.importorskip("triton")
    dispatch._load_all()  # an operator is registered when its module is imported
    for name in native.FAKES:
        cpu, device = (str(getattr(getattr(torch.ops, space), name).default._schema) for space in ("aot_fast_cpu", "aot_fast"))
        assert cpu.replace("aot_fast_cpu::", "aot_fast::") == device


@needs_csrc
def test_cpu_tensors_go_to_csrc_and_fp64_to_the_reference():
    x = torch.zeros(2)
    assert dispatch.implementation("logprob", x).__name__ == "logprob_csrc"
    assert dispatch.implementation("logprob", x.double()).__name__ == "logprob_reference"
    with K.backend("csrc"):
        assert dispatch.implementation("logprob", x.double()).__name__ == "logprob_reference"
        with pytest.raises(ValueError, match="backend: given 'csrc' for a tensor on meta, expected a CPU tensor"):
            K.policy_loss(x.to("meta"), x.to("meta"))


@needs_csrc
def test_operators_called_alone_do_not_read_beyond_what_they_are_given():
    ops, short, rows = torch.ops.aot_fast_cpu, torch.zeros(2), torch.zeros(64, 8)
    targets, step = torch.zeros(64, dtype=torch.int64), [torch.ones(64, dtype=torch.float64)] * 4
    calls = (
        (lambda: ops.row_stats(rows, targets[:2], 1.0), "targets: given 2 numbers, expected 64"),
        (lambda: ops.logit_gradient(rows, targets, *[short] * 5, None, None, 1.0, torch.float32), "statistics: given 2"),
        (lambda: K.dispatch._load("native:policy_loss_csrc")(targets.float(), None, short, *[None] * 5, SETTINGS), "advantages: given 2"),
        (lambda: ops.guided_velocity(rows, short, 2.0, False), "v_uncond: given 2 numbers, expected 512"),
        (lambda: ops.flow_logp(rows, rows, None, short, None, None, step, 1.0, False, False, False), r"latents: given shape \[2\]"),
        (lambda: ops.flow_logp(rows, rows.view(1, 512), None, rows, None, None, step, 1.0, False, False, False), r"given shape \[1, 512\]"),
        (lambda: ops.flow_logp(rows, rows, None, rows, None, None, [], 1.0, False, False, False), "step: given 0 tensors, expected 4"),
        (lambda: ops.row_stats(rows.long(), targets, 1.0), "dtype: given Long, expected float32"),
        (lambda: ops.flow_step(rows, rows, None, None, None, step, 1.0, False, False, torch.int64), "dtype: given Long"),
        (lambda: ops.flow_logp(rows, rows, None, rows, None, None, [short] * 4, 1.0, False, False, False), "step: given 2"),
        (lambda: ops.group_advantage(short, targets + 1, 1e-6, "group", 1), "group_sizes: given sizes that add up to more than 2"),
    )
    for call, message in calls:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(native, "problem", lambda: "csrc/cpu is not built")


def test_without_csrc_the_reference_runs_and_forcing_it_is_an_error(not_built, monkeypatch):
    x = torch.zeros(2)
    assert dispatch.implementation("policy_loss", x).__name__ == "policy_loss_reference"
    said = "backend: given 'csrc', expected one that is there: csrc/cpu is not built"
    with pytest.raises(ValueError, match=said), K.backend("csrc"):
        pass
    monkeypatch.setenv("AOT_FAST_BACKEND", "csrc")
    with pytest.raises(ValueError, match=said):
        K.policy_loss(x, x)


EVERYTHING = """
import sys, torch
import aot_fast.kernels as K
from aot_fast.kernels import native
threads, file = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(threads)
g = torch.Generator().manual_seed(0)
normal = lambda *shape: torch.randn(*shape, generator=g)
out = [torch.tensor(list(native.description().encode()))]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    logits = (3 * normal(37, 5003)).to(dtype).requires_grad_()
    scored = K.logprob(logits, torch.randint(0, 5003, (37,), generator=g), temperature=0.9)
    out += [scored.logp, scored.entropy, *torch.autograd.grad((scored.logp * normal(37)).sum() + scored.entropy.sum(), logits)]
n = 300_001
for loss in ("ppo", "gspo", "cispo"):
    logp = (-normal(n).abs()).requires_grad_()
    old, ref, advantages = logp.detach() + 0.2 * normal(n), logp.detach() + 0.1 * normal(n), normal(n)
    ids = torch.arange(n) // 777
    options = {"beta": 0.1, "loss": loss, "seq_ids": ids, "agg": "seq_mean", "mask": normal(n) > -1}
    made = K.policy_loss(logp, advantages, old_logp=old, ref_logp=ref, **options)
    out += [made.loss, *torch.autograd.grad(made.loss, logp), *made.metrics.values()]
x, v, u, r, old = (normal(5, 300, 64) for _ in range(5))
v.requires_grad_(), u.requires_grad_()
step = K.flow_step(x, v, 0.8, 0.7, eta=0.7, seeds=torch.arange(5), v_uncond=u, guidance=3.0, storage_dtype=torch.bfloat16)
made = K.flow_logp(x, v, step.x_next, 0.8, 0.7, dynamics="flow_sde", eta=0.7, v_ref=r, v_old=old, v_uncond=u, guidance=3.0)
assert torch.equal(step.logp, made.logp)
out += [step.x_next, *made, *torch.autograd.grad(made.logp.sum() + made.kl.sum() + made.drift.sum(), (v, u))]
out += [K.guided_velocity(v, u, guidance=3.0)]
torch.save([t.detach() for t in out], file)
"""


def everything(tmp_path: Path, threads: int, **env: str) -> list[torch.Tensor]:
    file = tmp_path / f"{threads} {env}.pt"
    command = [sys.executable, "-c", EVERYTHING, str(threads), str(file)]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"AOT_FAST_BACKEND": "csrc", **env}, check=True)
    return torch.load(file)


@needs_csrc
def test_bits_do_not_depend_on_the_number_of_threads(tmp_path):
    one, two = (everything(tmp_path, threads, OMP_NUM_THREADS="2") for threads in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@needs_csrc
@pytest.mark.parametrize("isa", ("baseline", "avx2"))
def test_every_instruction_set_agrees(tmp_path, isa):
    """They round apart: an exponential is off by 2e-7, sums of some thousand of them by less than 1e-6; a bf16 or fp16 number by one unit,
    2^-8. A ratio on either side of a clip is counted differently: by one or two of 300,001."""
    if os.uname().machine != "x86_64":
        pytest.skip("there is only one")
    lesser, best = everything(tmp_path, 1, AOT_FAST_ISA=isa), everything(tmp_path, 1)
    assert bytes(lesser[0].tolist()) == f"C++ ({isa})".encode()
    for a, b in zip(lesser[1:], best[1:], strict=True):
        if a.dtype == torch.float32:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-5)


@needs_csrc
def test_an_unknown_instruction_set_is_refused():
    code = "import torch; import aot_fast.kernels as K; K.logprob(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"AOT_FAST_ISA": "neon"}, capture_output=True, text=True)
    assert done.returncode and "AOT_FAST_ISA: given 'neon', expected 'baseline', 'avx2' or 'avx512'" in done.stderr


@needs_csrc
def test_a_library_for_another_torch_is_said_and_does_without(tmp_path):
    """A file that cannot be loaded stands for it."""
    site = tmp_path / "aot_fast"
    shutil.copytree(ROOT / "aot_fast" / "kernels", site / "kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "aot_fast" / "__init__.py", site)
    for module in (ROOT / "kernels").glob("*.py"):
        shutil.copy(module, site / "kernels")
    (site / "kernels" / "_cpu.so").write_bytes(b"not a library")
    code = "import torch, aot_fast.kernels as K; K.policy_loss(torch.zeros(2), torch.ones(2)); print(K.dispatch.csrc_problem())"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "_cpu.so does not load, was it built for another torch?" in done.stdout
