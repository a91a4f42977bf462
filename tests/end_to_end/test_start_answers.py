"""Runs whose divergence is from what was kept of the start's answers: made once, shared, lost, cut short, made again.

The model has dropout, and the loss NEFTune: neither is in what the start says.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist import faults
from sft_dist.data.top_logprobs import TopTable
from tests.end_to_end.conftest import Place, make_place
from tests.helpers import oracle
from tests.helpers.conversations import make_records

pytestmark = pytest.mark.slow

K = 4
COMPUTING, TAIL = f"computing the {K} likeliest tokens", "of the mass, in the mean over targets"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(
        tmp_path_factory.mktemp("start-answers"),
        anchor={"kl": 2.0, "kl_top_k": K, "drift": "never"},
        objective={"neftune_alpha": 5.0},
        schedule={"epochs": 3, "max_steps": 4},
        evaluate={"every": 0},
        batch={"global_packs": 3, "packs_per_micro_batch": 2},
    )


def kept(place: Place) -> list[Path]:
    return sorted((place.folder / "prepared").glob("top-*"))


def opened(folder: Path) -> TopTable:
    return TopTable(folder, json.loads((folder / "manifest.json").read_text())["identity"])


def summary(place: Place, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place.folder / run / "summary.json").read_text())
    return found


def test_a_run_that_was_killed_stopped_and_robbed_of_its_files_ends_as_one_that_never_was(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.VARIABLE, "start_answers.before_rename:SIGKILL")
    (killed,) = place.train("stopped", ranks=1)
    assert killed.returncode == -9 and COMPUTING in killed.stdout, killed.stdout
    assert kept(place) == [] and len(list((place.folder / "prepared").glob(".top-*.tmp"))) == 1
    monkeypatch.delenv(faults.VARIABLE)

    done, _ = place.train("stopped", "checkpoint.stop_at_step=2")
    assert done.returncode == 75 and COMPUTING in done.stdout and TAIL in done.stdout, done.stdout
    (folder,) = kept(place)
    assert list((place.folder / "prepared").glob(".top-*.tmp")) == []
    model, tokenizer = oracle.load(place.folder / "model")
    table = opened(folder)
    record = make_records(40, max_words=6)[7]
    expected = []
    for context, output in oracle.turn_contexts(tokenizer, record["messages"]):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([context + output]), use_cache=False).logits[0]
        expected.append(logits[len(context) - 1 : -1].log_softmax(-1).topk(K).values)
    told = table.rows(7, sum(map(len, expected))).logprobs[:, :K]
    assert torch.allclose(torch.from_numpy(told.copy()).double(), torch.cat(expected), rtol=0, atol=1e-4)

    done, _ = place.train("whole")
    assert done.returncode == 0 and COMPUTING not in done.stdout and TAIL in done.stdout, done.stdout
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    shutil.rmtree(folder)
    done, _ = place.train("stopped")
    assert done.returncode == 0 and COMPUTING in done.stdout, done.stdout
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    whole, resumed = place.state("whole", 4), place.state("stopped", 4)
    assert whole and all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert [s["loss"] for s in place.steps("stopped")] == [s["loss"] for s in place.steps("whole")]
    assert all(entry["loss"] > entry["nll"] for entry in place.steps("whole")[1:]), "a divergence is at least 0"
    said = {"k": K, "mean_tail_mass": table.mean_tail_mass, "num_targets": table.num_rows}
    assert summary(place, "whole")["kl_top_k"] == summary(place, "stopped")["kl_top_k"] == said
    lines = (place.folder / "stopped" / "metrics.jsonl").read_text().splitlines()
    records = [entry for entry in map(json.loads, lines) if entry["kind"] == "kl_top_k"]
    assert [entry["step"] for entry in records] == [0, 2] and records[0] == {"kind": "kl_top_k", "step": 0} | said
