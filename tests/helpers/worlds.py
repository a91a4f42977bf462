"""Real worlds of gloo ranks: one start for many cases, since a start costs seconds.

`run_world` starts the ranks of tests/helpers/world_cases.py; each case's answer (of rank 0) comes back as a value.
"""

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.helpers import warm
from tests.helpers.warm import ROOT as ROOT


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    return warm.with_one_thread(os.environ) | {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def start_ranks(size: int, arguments: Sequence[str]) -> list[warm.Started]:
    """Start `python ARGUMENTS` once per rank; stderr goes to stdout."""
    port, turn = free_port(), warm.next_turn()
    return [warm.start(arguments, rank_environment(rank, size, port), server=turn + rank) for rank in range(size)]


def run_ranks(size: int, arguments: Sequence[str], *, timeout_s: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """Start `python ARGUMENTS` once per rank and wait for all; none outlives the call."""
    ranks = start_ranks(size, arguments)
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
