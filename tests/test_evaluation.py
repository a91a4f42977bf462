"""Evaluation of a checkpoint: what its changes are counted from."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config import RunConfig
from sft_dist.data.selection import Selection
from sft_dist.evaluation import TASK, Point, _before
from sft_dist.preparation import heldout_set, retention_set
from sft_dist.train import contract
from sft_dist.train.checkpoint import Checkpoint, TrainState
from sft_dist.train.forgetting import Retention, SourceNll
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import build_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


def config_of(model: Path, folder: Path, **more: Any) -> RunConfig:
    data = {name: str(folder / f"{name}.jsonl") for name in ("heldout", "retention")}
    data |= {"max_length": 384, "cache_dir": str(folder / "prepared"), "num_processes": 1}
    return RunConfig.model_validate({"run_dir": "r", "model": {"path": str(model)}, "data": data} | more)


def sets(config: RunConfig) -> tuple[Selection, Selection]:
    heldout, retention = heldout_set(config), retention_set(config)
    assert heldout is not None and retention is not None
    return heldout, retention


def test_what_a_run_knew_of_step_0_counts_for_the_same_data_alone(model: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("heldout", "retention")):
        write_jsonl(tmp_path / f"{name}.jsonl", make_records(5, seed=seed, max_words=6))
    saved = config_of(model, tmp_path)
    heldout, retention = sets(saved)
    content = Retention(retention).contents["retention"]
    state = TrainState(
        step=3, heldout_nll_before=2.0, retention=(SourceNll("retention", content, 9, before=3.0, now=3.5),)
    )
    manifest = {"state": json.loads(json.dumps(asdict(state))), "heldout": contract.samples_digest(heldout.dataset)}
    found = Checkpoint(tmp_path, manifest)
    points = [Point(1.0, None, None)]
    assert _before(points, found, saved, saved, heldout, retention) == {TASK: 2.0, "retention retention": 3.0}

    # Of the same samples other targets are scored: retention data know no such choice.
    otherwise = config_of(model, tmp_path, objective={"train_on": "all"})
    expected = {"retention retention": 3.0}
    assert _before(points, found, otherwise, saved, *sets(otherwise)) == expected

    write_jsonl(tmp_path / "heldout.jsonl", make_records(5, seed=7, max_words=6))
    assert _before(points, found, saved, saved, *sets(saved)) == expected
    write_jsonl(tmp_path / "retention.jsonl", make_records(5, seed=8, max_words=6))
    assert _before(points, found, saved, saved, *sets(saved)) == {}
