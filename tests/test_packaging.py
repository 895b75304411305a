"""kernels/ is imported as aot_fast.kernels and never shadows the Hugging Face package `kernels` (DESIGN.md section 2)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aot_fast.kernels import native
from tests.conftest import ROOT

CHECK = """
import site, sys
for folder in sys.argv[1:]:
    site.addsitedir(folder)
import kernels
import aot_fast.kernels
from aot_fast.kernels import dispatch
print(kernels.__file__)
print(dispatch.__file__)
"""


@pytest.fixture
def stand_in(tmp_path):
    """A package with the name of the Hugging Face one, as it would be installed."""
    folder = tmp_path / "site"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("")
    return folder


def found(folders: list[Path], cwd: Path) -> tuple[Path, Path]:
    """Files of `kernels` and of `aot_fast.kernels.dispatch` in a new process."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # -P would keep the current folder out of the path: running from the repository root is just what is tested.
    command = [sys.executable, "-c", CHECK, *map(str, folders)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    return Path(first), Path(second)


def pip(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", *words, "--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | (env or {}), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def test_from_the_repository_root(stand_in):
    theirs, ours = found([stand_in], ROOT)
    assert theirs.is_relative_to(stand_in) and ours == ROOT / "kernels" / "dispatch.py"


def test_from_a_wheel(stand_in, tmp_path):
    pip("install", "--target", str(tmp_path / "wheel"), ".")
    theirs, ours = found([stand_in, tmp_path / "wheel"], tmp_path)
    assert theirs.is_relative_to(stand_in) and ours == tmp_path / "wheel" / "aot_fast" / "kernels" / "dispatch.py"
    assert not (tmp_path / "wheel" / "kernels").exists()
    assert (tmp_path / "wheel" / "aot_fast" / "configs" / "tiny.yaml").is_file()
    assert native.problem() or list((tmp_path / "wheel" / "aot_fast" / "kernels").glob("_cpu*.so"))


def test_without_a_compiler_the_rest_is_built_and_it_is_said(tmp_path):
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        "csrc/cpu skipped, the operators run in plain torch on a CPU: " in done.stdout and "no-such-compiler" in done.stdout + done.stderr
    )
    made = tmp_path / "lib" / "aot_fast" / "kernels"
    assert (made / "dispatch.py").is_file() and not list(made.glob("*.so"))


def test_editable(stand_in, tmp_path):
    # --ignore-installed: else pip takes the environment's own installation, and `aot-fast` with it, away.
    pip("install", "--ignore-installed", "--prefix", str(tmp_path / "prefix"), "--editable", ".", env={"AOT_FAST_CSRC": "0"})
    site = next((tmp_path / "prefix").rglob("site-packages"))
    theirs, ours = found([stand_in, site], tmp_path)
    assert theirs.is_relative_to(stand_in) and ours == ROOT / "kernels" / "dispatch.py"


def test_kernels_import_needs_torch_only():
    script = (
        "import sys; import aot_fast.kernels; print([n for n in ('transformers', 'diffusers', 'deepspeed', 'peft') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
