"""Real worlds of gloo ranks: one start for many cases, since a start costs ten seconds.

`run_world` starts the ranks of tests/helpers/world_cases.py; each case's answer (of rank 0) comes back as a value.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    return os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }


def run_ranks(size: int, arguments: Sequence[str], *, timeout_s: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """Start `python ARGUMENTS` once per rank and wait for all; none outlives the call."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=rank_environment(rank, size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [rank.communicate(timeout=timeout_s)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [
        subprocess.CompletedProcess(rank.args, rank.returncode, output)
        for rank, output in zip(ranks, outputs, strict=True)
    ]


def run_world(
    size: int, cases: Sequence[dict[str, Any]], folder: Path, *, module: str = "tests.helpers.world_cases"
) -> list[Any]:
    """The answers of the named cases of a module, computed by `size` ranks in one world."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(list(cases)))
    done = run_ranks(size, ["-m", module, str(folder)])
    for rank, process in enumerate(done):
        assert process.returncode == 0, f"rank {rank} of {size}:\n{process.stdout[-4000:]}"
    return [torch.load(folder / f"answer-{number}.pt") for number in range(len(cases))]
