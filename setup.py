"""Packaging. Never needs torch: the base install is the kernels alone (torch, triton), the extra `game` is the rest.

With torch and a compiler at hand the operators of csrc/cpu are built too: pip install --no-build-isolation . (AOT_FAST_CSRC=0 leaves them
out).
"""

import os
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
COMPILE = ["-O3", "-g0", "-fno-math-errno", "-fopenmp", "-Wno-psabi"]


class BuildPy(build_py):
    """Copies kernels/*.py into aot_fast/kernels.

    The folder must not become a top-level package named `kernels`: transformers imports the Hugging Face package of that name.
    """

    def run(self):
        super().run()
        if self.editable_mode:  # aot_fast/kernels/__init__.py finds the folder beside the package
            return
        target = Path(self.build_lib) / "aot_fast" / "kernels"
        target.mkdir(parents=True, exist_ok=True)
        for source in sorted((ROOT / "kernels").glob("*.py")):
            shutil.copy2(source, target / source.name)


CUDA_COMPILE = ["-O3", "-gencode=arch=compute_90a,code=sm_90a"]


def skipped(what: str, reason: object) -> None:
    instead = {"csrc/cpu": "the operators run in plain torch on a CPU", "csrc/cuda": "Triton's run on a GPU"}[what]
    print(f"aot_fast: {what} skipped, {instead}: {reason}", flush=True)


def files(folder: str, *suffixes: str) -> list[str]:
    """Relative to setup.py, as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for suffix in suffixes for path in (ROOT / "csrc" / folder).glob(f"*.{suffix}"))


def extensions() -> tuple[list, type]:
    """What of csrc can be built here, and the command that does; none where torch cannot be imported, as in an isolated build."""
    if os.environ.get("AOT_FAST_CSRC") == "0":
        skipped("csrc/cpu", "AOT_FAST_CSRC=0")
        return [], build_ext
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        skipped("csrc/cpu", f"{error} (pip install --no-build-isolation . builds against the torch that is installed)")
        return [], build_ext

    class BuildExt(BuildExtension):
        """A machine without a compiler gets everything else."""

        def build_extension(self, extension):
            what = "csrc/" + extension.name.rpartition("._")[2]
            try:
                super().build_extension(extension)
            except Exception as error:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)  # else an older one would go on being used
                skipped(what, error)
            else:
                print(f"aot_fast: {what} built", flush=True)

    cpu = files("cpu", "h", "inc")
    options = {"extra_compile_args": COMPILE, "extra_link_args": ["-fopenmp"]}
    made = [CppExtension("aot_fast.kernels._cpu", files("cpu", "cpp"), depends=cpu, optional=True, **options)]
    if torch.version.cuda is None:
        skipped("csrc/cuda", "this torch has no CUDA")
    elif CUDA_HOME is None:
        skipped("csrc/cuda", "no nvcc (CUDA_HOME)")
    else:
        compile_args = {"cxx": ["-O3", "-g0"], "nvcc": CUDA_COMPILE}
        made.append(
            CUDAExtension(
                "aot_fast.kernels._cuda",
                files("cuda", "cpp", "cu"),
                depends=files("cuda", "h"),
                optional=True,
                extra_compile_args=compile_args,
            )
        )
    return made, BuildExt


EXTENSIONS, BUILD_EXT = extensions()

setup(
    name="aot_fast",
    version="0.1.0",
    description="Adversarial opponent training of vision-language models: the whole game, fast",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["aot_fast", "aot_fast.*"]),
    package_data={"aot_fast": ["configs/*.yaml", "report/*.html", "report/*.css", "assets/**/*"]},
    ext_modules=EXTENSIONS,
    cmdclass={"build_py": BuildPy, "build_ext": BUILD_EXT},
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'"],
    extras_require={
        "game": [
            "transformers>=5.17,<6",
            "diffusers>=0.42,<0.43",
            "deepspeed>=0.19.8",
            "peft>=0.21",
            "accelerate>=1.15",
            "safetensors>=0.8",
            "numpy>=2",
            "pillow>=12",
            "scikit-image>=0.26",
            "jsonargparse>=4.53",
            "pyyaml>=6",
            "rich>=14",
            "tensorboard>=2.20",
            "matplotlib>=3.10",
            "jinja2>=3.1",
        ],
        "gpu": ["flash-attn>=2.8", "xformers", "liger-kernel>=0.6"],
        "trackers": ["wandb", "trackio"],
        "dev": ["pytest>=9", "pytest-timeout", "pytest-xdist", "pytest-benchmark", "hypothesis", "ruff"],
    },
    entry_points={"console_scripts": ["aot-fast=aot_fast.__main__:main"]},
)
