"""Launch grids of large inputs, taken down without running: the first axis reaches 2^31 - 1, the second and third 65,535."""

import importlib
import math

import pytest
import torch

import aot_fast.kernels as K

from .conftest import INTERPRETED

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="tensors on a CPU reach the kernels only under the interpreter")
MODULES = ("logprob", "group_advantage", "policy_loss", "philox", "guidance", "flow_step", "flow_policy_loss")
MANY = 65_537


class Recorder:
    """Stands in for a kernel: keeps the grid of each launch."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *arguments, **options: None


@pytest.fixture
def grids(monkeypatch):
    """Grids of everything launched in the test; no kernel runs, so results are undefined."""
    from triton.runtime.interpreter import InterpretedFunction

    recorder = Recorder()
    for name in MODULES:
        module = importlib.import_module(f"aot_fast.kernels.{name}_triton")
        for attribute, value in list(vars(module).items()):
            if isinstance(value, InterpretedFunction):
                monkeypatch.setattr(module, attribute, recorder)
    with K.backend("triton"):
        yield recorder.grids


def logprob():
    logits = torch.zeros(MANY, 3, requires_grad=True)
    K.logprob(logits, torch.zeros(MANY, dtype=torch.long)).logp.sum().backward()


def wide_logprob():
    logits = torch.zeros(1, 10_000_000, requires_grad=True)
    K.logprob(logits, torch.zeros(1, dtype=torch.long)).logp.sum().backward()


def policy_loss():
    logp, ids = torch.zeros(MANY, requires_grad=True), torch.arange(MANY)
    K.policy_loss(logp, torch.zeros(MANY), seq_ids=ids, loss="gspo", agg="seq_mean").loss.backward()


def group_advantage():
    K.group_advantage(torch.zeros(MANY), [1] * MANY)


def samples():
    x, v = torch.zeros(MANY, 2, 4), torch.zeros(MANY, 2, 4, requires_grad=True)
    K.flow_step(x, v.detach(), 0.8, 0.7, eta=0.7, seeds=torch.arange(MANY))
    K.flow_logp(x, K.guided_velocity(v, x, guidance=2.0), x, 0.8, 0.7, dynamics="dance", eta=0.7, v_ref=x).logp.sum().backward()


def a_large_sample():
    x, v = torch.zeros(1, 1024, 4096), torch.zeros(1, 1024, 4096, requires_grad=True)
    K.flow_logp(x, v, x, 0.8, 0.7, dynamics="dance", eta=0.7).logp.sum().backward()


def normals():
    importlib.import_module("aot_fast.kernels.philox_triton").philox_normal_triton(torch.arange(MANY), 4)


@pytest.mark.parametrize("call", [logprob, wide_logprob, policy_loss, group_advantage, samples, a_large_sample, normals])
def test_grids_stay_within_the_limits(call, grids):
    call()
    assert grids
    for first, *others in grids:
        assert 1 <= first <= 2**31 - 1 and all(1 <= size <= 65_535 for size in others), grids
    if call not in (wide_logprob, a_large_sample):  # what there are many of lies on the first axis
        assert max(first for first, *_ in grids) >= (math.ceil(MANY / 1024) if call is policy_loss else MANY), grids
