"""Every Triton kernel that ships, compiled for sm_90a without a GPU: no stack, no spill, no fp64, wide loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows():
    # A process of its own: under the interpreter, which the other tests use, nothing can be compiled.
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "aot_fast.kernels.inspect", "--json"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_passes_its_gates(rows):
    assert not {row["name"]: row["broken"] for row in rows if row["broken"]}
    assert len({row["name"] for row in rows}) == len(rows) >= 40


def test_the_passes_over_the_logits_leave_room_for_latency(rows):
    # 8 warps at 64 registers a thread: four such programs on a multiprocessor, 128 KB of loads in flight
    assert all(row["registers"] <= 64 for row in rows if row["name"].startswith(("logprob", "logit")))
