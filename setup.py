"""Packaging. Never needs torch: the base install is the kernels alone (torch, triton), the extra `game` is the rest."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


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
    cmdclass={"build_py": BuildPy},
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
        "dev": ["pytest>=9", "pytest-timeout", "pytest-benchmark", "hypothesis", "ruff"],
    },
    entry_points={"console_scripts": ["aot-fast=aot_fast.__main__:main"]},
)
