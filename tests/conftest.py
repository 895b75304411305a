"""Settings shared by all tests: no network, one thread a process, Triton's interpreter where there is no GPU."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """For a child process: without the process group that the `runtime` fixture has opened in this one."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in group} | {"PYTHONPATH": str(ROOT)} | (more or {})


def launch(ranks: int, *command: str, timeout_s: float = 120, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run `python command...` on `ranks` ranks under torchrun (1: plain python); the output is captured."""
    python = [sys.executable, *command]
    if ranks > 1:
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
        python = [*run, *command]
    return subprocess.run(python, cwd=ROOT, env=environment(env), capture_output=True, text=True, timeout=timeout_s)


@pytest.fixture
def torchrun():
    """`launch`, failing the test with the output when the command fails."""

    def checked(ranks: int, *command: str, **kwargs) -> str:
        done = launch(ranks, *command, **kwargs)
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    return checked


@pytest.fixture(scope="session")
def runtime():
    """A process group of one in the test process."""
    from aot_fast.config import EngineConfig, RunConfig
    from aot_fast.engine import close_runtime, open_runtime

    yield open_runtime(EngineConfig(timeout_s=60), RunConfig(threads=1))
    close_runtime()
