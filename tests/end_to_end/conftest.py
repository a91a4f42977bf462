"""Run files, runs and their results for tests that go through the command line."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.helpers import warm
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import build_model
from tests.helpers.worlds import rank_environment, run_ranks


@dataclass(frozen=True)
class Place:
    """A folder with a tiny model with dropout, data and a run file."""

    folder: Path
    run_file: Path

    def train(self, run: str, *overrides: str, ranks: int = 2) -> list[subprocess.CompletedProcess[str]]:
        arguments = ["-m", "sft_dist", "train", str(self.run_file), f"run_dir={self.folder / run}", *overrides]
        return run_ranks(ranks, arguments)

    def verb(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in rank_environment(0, 1, 0).items() if not k.startswith(("RANK", "WORLD", "LOCAL_"))}
        process = warm.start(["-m", "sft_dist", *arguments], env, separate_stderr=True)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.wait(), out, err)

    def steps(self, run: str) -> list[dict[str, Any]]:
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        return [entry for line in lines if (entry := json.loads(line))["kind"] == "train"]

    def outcome(self, run: str) -> dict[str, Any]:
        outcome: dict[str, Any] = json.loads((self.folder / run / "outcome.json").read_text())
        return outcome

    def state(self, run: str, step: int) -> dict[str, torch.Tensor]:
        """Every tensor of every optimizer shard of a checkpoint: weights and moments, rank by rank."""
        from sft_dist.model.zero import safe_load

        tensors: dict[str, torch.Tensor] = {}
        for file in sorted((self.folder / run / "checkpoints" / f"step-{step:08d}" / "shards").glob("*optim*.pt")):
            _collect(safe_load(file)["optimizer_state_dict"], file.name, tensors)
        return tensors


def _collect(value: Any, name: str, into: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        into[name] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(item, f"{name}.{key}", into)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _collect(item, f"{name}.{number}", into)


def make_place(folder: Path, **changes: Any) -> Place:
    build_model(folder / "model", "gpt2", dropout=0.1)
    write_jsonl(folder / "train.jsonl", make_records(40, max_words=6))
    write_jsonl(folder / "heldout.jsonl", make_records(10, seed=1, max_words=6))
    tree = {
        "run_dir": "unused",
        "seed": 3,
        "model": {"path": str(folder / "model")},
        "data": {
            "train": str(folder / "train.jsonl"),
            "heldout": str(folder / "heldout.jsonl"),
            "max_length": 384,
            "cache_dir": str(folder / "prepared"),
            "num_processes": 1,
        },
        "batch": {"global_packs": 3},
        "optimizer": {"learning_rate": 5e-3, "weight_decay": 0.1},
        "schedule": {"epochs": 2, "max_steps": 6},
        "evaluate": {"every": 2},
        "checkpoint": {"every": 0, "keep": 100},
    }
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree | changes))
    return Place(folder, run_file)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("end-to-end"))


@pytest.fixture(scope="session")
def uninterrupted(place: Place) -> Place:
    """The same place after a whole run `whole` on two ranks."""
    done = place.train("whole")
    assert [process.returncode for process in done] == [0, 0], done[0].stdout
    return place
