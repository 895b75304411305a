"""Which implementation runs, and how the package is found from a checkout and from a wheel."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aot_fast.kernels as K
from aot_fast.kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
import aot_fast.kernels as K
heavy = [name for name in ("transformers", "triton", "diffusers", "deepspeed", "numpy.testing") if name in sys.modules]
assert not heavy, heavy
import torch
from aot_fast.kernels.policy_loss import policy_loss
assert policy_loss is K.policy_loss
K.policy_loss(torch.zeros(2), torch.ones(2))
print(K.policy_loss.__code__.co_filename)
"""


def run(folder: Path, *path: Path) -> subprocess.CompletedProcess:
    env = {"PYTHONPATH": ":".join(map(str, (folder, *path))), "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, "-c", SCRIPT], cwd=folder, env=env, capture_output=True, text=True)


def stand_in(folder: Path) -> Path:
    """A package as the Hugging Face one is named, with a module named as one of ours."""
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("STAND_IN = True\n")
    (folder / "kernels" / "dispatch.py").write_text("raise ImportError('not ours')\n")
    return folder


def test_from_a_checkout_only_torch_is_imported():
    done = run(ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "kernels" / "policy_loss.py")


def test_from_a_wheel_the_modules_lie_beside_the_package(tmp_path):
    site = stand_in(tmp_path / "site")
    shutil.copytree(ROOT / "aot_fast" / "kernels", site / "aot_fast" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "aot_fast" / "__init__.py", site / "aot_fast")
    for module in (ROOT / "kernels").glob("*.py"):
        shutil.copy(module, site / "aot_fast" / "kernels")
    done = run(site)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(site / "aot_fast" / "kernels" / "policy_loss.py")


def test_the_folder_is_not_a_package_of_its_own(tmp_path):
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import kernels, aot_fast.kernels as K; assert kernels.STAND_IN and K.policy_loss"
    env = {"PYTHONPATH": f"{ROOT}:{stand_in(tmp_path / 'site')}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_reference_can_be_loaded_and_every_operator_has_one():
    for path in dispatch.IMPLEMENTATIONS["reference"].values():
        assert callable(dispatch._load(path))
    for table in dispatch.IMPLEMENTATIONS.values():
        assert table.keys() <= dispatch.IMPLEMENTATIONS["reference"].keys()


def test_an_unknown_backend_is_refused_with_the_names_that_exist(monkeypatch):
    names = r"\['auto', 'reference', 'triton', 'csrc'\]"
    with pytest.raises(ValueError, match=f"backend: given 'cuda', expected one of {names}"), K.backend("cuda"):
        pass
    monkeypatch.setenv("AOT_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="AOT_FAST_BACKEND: given 'fast'"):
        K.policy_loss(torch.zeros(1), torch.zeros(1))
    with K.backend("reference"):  # the context manager goes before the variable
        K.policy_loss(torch.zeros(1), torch.zeros(1))


def test_a_backend_is_forced_by_name_and_what_it_lacks_falls_back_counted_and_said_once(monkeypatch):
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "other", {"logprob": "group_advantage:group_advantage_reference"})
    monkeypatch.setattr(dispatch, "fallbacks", type(dispatch.fallbacks)())
    with K.backend("other"):
        assert dispatch.implementation("logprob").__name__ == "group_advantage_reference"
        with K.backend("auto"):
            assert dispatch.implementation("logprob").__name__ == "logprob_reference"
        with pytest.warns(UserWarning, match="'other' has no policy_loss") as said:
            K.policy_loss(torch.zeros(1), torch.zeros(1))
            K.policy_loss(torch.zeros(1), torch.zeros(1))
        assert len(said) == 1 and dispatch.fallbacks["other", "policy_loss"] == 2
    assert dispatch.implementation("logprob").__name__ == "logprob_reference"
    monkeypatch.setenv("AOT_FAST_BACKEND", "other")
    assert dispatch.implementation("logprob").__name__ == "group_advantage_reference"
