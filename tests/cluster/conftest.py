"""One cluster for all tests of this folder, and the stub that stands in for sft-dist."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from .slurm import Cluster, missing_programs, start_cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm of two nodes; when the tests are over no process of it is left. In CI it is never missing."""
    missing = missing_programs()
    if missing is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    with start_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which `python -m sft_dist` is the stub."""
    package = tmp_path_factory.mktemp("stub") / "sft_dist"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("stub_rank.py"), package / "__main__.py")
    return package.parent
