"""Packaging only: what ships, what it needs, which commands it brings. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    # Read, not imported: importing would need the dependencies that are about to be installed.
    text = (ROOT / "sft_dist" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('sft_dist/__init__.py has no line __version__ = "..."')
    return match.group(1)


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="sft-dist",
    version=version(),
    description="Distributed supervised fine-tuning: the same gradient on one CPU and on hundreds of GPUs",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # ds_configs/ and slurm/ stand at the top of the repository, where people look for them; in a wheel they
    # lie inside the package (sft_dist/ds_configs, sft_dist/slurm), where they collide with nothing.
    packages=[*find_packages(include=["sft_dist*", "launcher*"]), "sft_dist.ds_configs", "sft_dist.slurm"],
    package_dir={"sft_dist.ds_configs": "ds_configs", "sft_dist.slurm": "slurm"},
    package_data={
        "sft_dist.data": ["templates/*.jinja"],
        "sft_dist.ds_configs": ["*.json", "*.md"],
        "sft_dist.slurm": ["*"],
    },
    include_package_data=False,
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        # Exactly: partitioned weights, checkpoints and leaf modules use what is no public interface.
        "deepspeed==0.19.8",
        "datasets>=5,<6",
        "accelerate",
        "filelock",
        "jinja2",
        "mpi4py>=4",
        "numpy",
        "peft>=0.21,<0.22",
        "psutil",
        "pyarrow",
        "pydantic>=2",
        "PyYAML",
        "safetensors",
        "tensorboard",
        "tokenizers",
    ],
    extras_require={
        "mpi": ["mpich"],
        "demo": ["gguf"],
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis"],
        "dev": ["ruff", "mypy", "types-PyYAML"],
    },
    entry_points={
        "console_scripts": ["sft-dist = sft_dist.cli:main", "sft-launch = launcher.__main__:main"],
    },
)
