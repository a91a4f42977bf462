"""A prediction head through the command line: train on two ranks, stop, resume, evaluate, predict, export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.end_to_end.conftest import Place
from tests.helpers.conversations import write_jsonl
from tests.helpers.encoders import build_encoder, make_labelled
from tests.helpers.models import build_model
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """An encoder with dropout after a run `whole` on two ranks, of three packs a step."""
    folder = tmp_path_factory.mktemp("heads")
    build_encoder(folder / "model", "bert", dropout=0.1)
    write_jsonl(folder / "train.jsonl", make_labelled(60, pairs=True))
    write_jsonl(folder / "heldout.jsonl", make_labelled(20, seed=1, pairs=True))
    tree = {
        "run_dir": "unused",
        "model": {"path": str(folder / "model")},
        "head": {"kind": "single_label", "learning_rate": 2e-2},
        "data": {
            "train": str(folder / "train.jsonl"),
            "heldout": str(folder / "heldout.jsonl"),
            "max_length": 64,
            "cache_dir": str(folder / "prepared"),
            "num_processes": 1,
        },
        "batch": {"global_packs": 3},
        "optimizer": {"learning_rate": 5e-3, "weight_decay": 0.1},
        "schedule": {"epochs": 3, "max_steps": 6},
        "evaluate": {"every": 3},
        "checkpoint": {"every": 0, "keep": 100},
        "logging": {"tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    place = Place(folder, folder / "run.yaml")
    done = place.train("whole")
    assert [process.returncode for process in done] == [0, 0], done[0].stdout
    assert "new parameters ω: classifier.bias, classifier.weight" in done[0].stdout
    assert "LOAD REPORT" not in done[0].stdout
    return place


def entries(place: Place, run: str, kind: str) -> list[dict[str, Any]]:
    lines = (place.folder / run / "metrics.jsonl").read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line))["kind"] == kind]


def test_a_run_learns_and_says_how_good_its_answers_are(place: Place) -> None:
    found = entries(place, "whole", "heldout_head")
    assert [entry["step"] for entry in found] == [0, 3, 6]
    assert found[-1]["loss"] < found[0]["loss"]
    for entry in found:
        assert entry["count"] == 20 and sum(number for _, _, number in entry["confusion"]) == 20
        assert entry["accuracy"] == pytest.approx(sum(n for a, b, n in entry["confusion"] if a == b) / 20)
    saved = json.loads((place.folder / "whole" / "config.json").read_text())
    assert saved["head"]["labels"] == ["card", "fee", "money", "other"]


def test_stopped_and_resumed_no_bit_changes(place: Place) -> None:
    """With dropout, and a step that does not divide over the ranks."""
    done = place.train("stopped", "checkpoint.stop_at_step=2")
    assert [process.returncode for process in done] == [75, 75], done[0].stdout
    done = place.train("stopped")
    assert [process.returncode for process in done] == [0, 0], done[0].stdout
    expected, found = place.state("whole", 6), place.state("stopped", 6)
    assert expected.keys() == found.keys() and len(expected) > 6
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_another_label_set_is_no_resumed_run(place: Place) -> None:
    done = place.train("whole", "head.labels=[fee,card,money,other]", ranks=1)
    assert done[0].returncode == 78, done[0].stdout
    assert "head.labels" in done[0].stdout


def test_the_export_is_a_plain_classifier_and_predict_says_what_it_says_on_any_number_of_ranks(
    place: Place, tmp_path: Path
) -> None:
    done = place.verb("export", str(place.folder / "whole"), "--output", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "card", 1: "fee", 2: "money", 3: "other"}
    assert model.config.problem_type == "single_label_classification"
    records: list[dict[str, Any]] = make_labelled(9, seed=2, pairs=True)
    for record in records[:4]:
        del record["label"]
    bad = {"id": "empty", "text": ""}
    long = {"id": "long", "text": "card " * 70}
    write_jsonl(tmp_path / "new.jsonl", [*records[:3], bad, long, *records[3:]])
    done = place.verb("predict", str(place.folder / "whole"), str(tmp_path / "new.jsonl"), "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "9 of 11 records answered" in done.stderr and "refused 2: 1 no text, 1 too long" in done.stderr
    tree = yaml.safe_load(place.run_file.read_text()) | {"run_dir": str(place.folder / "whole")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    arguments = ["-m", "sft_dist", "predict", str(tmp_path / "run.yaml"), str(tmp_path / "new.jsonl")]
    both = run_ranks(2, [*arguments, "-o", str(tmp_path / "out-2")])
    assert [process.returncode for process in both] == [0, 0], both[0].stdout
    assert (tmp_path / "out-2").read_bytes() == (tmp_path / "out").read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["r0", "r1", "r2", "new:4", "long", *(f"r{n}" for n in range(3, 9))]
    assert lines[3]["refused"] == "no text" and "new.jsonl:4" in lines[3]["detail"]
    assert lines[4]["refused"] == "too long"
    for line, record in zip([line for line in lines if "refused" not in line], records, strict=True):
        row = tokenizer(record["text"], record.get("text_pair"), return_tensors="pt")
        with torch.no_grad():
            shares = model(**row).logits[0].softmax(-1).tolist()
        expected = dict(zip(model.config.id2label.values(), shares, strict=True))
        assert line["probabilities"] == pytest.approx(expected, abs=1e-5)
        assert line["label"] == max(expected, key=lambda name: expected[name])


@pytest.mark.parametrize("text", ["", "card " * 70])
def test_a_file_of_which_nothing_can_be_answered_has_all_its_lines(place: Place, tmp_path: Path, text: str) -> None:
    write_jsonl(tmp_path / "new.jsonl", [{"id": f"r{number}", "text": text} for number in range(3)])
    done = place.verb("predict", str(place.folder / "whole"), str(tmp_path / "new.jsonl"), "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    reason = "too long" if text else "no text"
    assert "0 of 3 records answered" in done.stderr and f"refused 3: 3 {reason}" in done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert len(lines) == 3 and [line["refused"] for line in lines] == [reason] * 3
    if text:
        assert [line["id"] for line in lines] == ["r0", "r1", "r2"]


def test_verbs_of_language_models_refuse_a_run_with_a_head_by_name(place: Place, tmp_path: Path) -> None:
    """The run folder tells what was trained; a run file that has the head is refused before anything is read."""
    run, output = str(place.folder / "whole"), str(tmp_path / "out")
    evaluate = ["evaluate", str(place.run_file), f"run_dir={run}", "--interpolate", "0,1", "--output", output]
    for command in (
        [*evaluate, "head={}"],
        ["score", str(place.run_file), "head={}", "--model", run, "--output", output],
        ["generate", "--model", run, "--prompt", "card"],
    ):
        done = place.verb(*command)
        assert done.returncode == 78, (command, done.stdout, done.stderr)
        assert "trained a prediction head (head.kind: single_label)" in done.stderr, done.stderr
    done = place.verb(*evaluate)
    assert done.returncode == 2 and "evaluate: not known for a prediction head" in done.stderr, done.stderr
    exported = place.verb("export", run, "--output", output, "--interpolate", "0.5")
    assert exported.returncode == 78 and "holds a head, which the pre-trained model lacks" in exported.stderr
    assert not (tmp_path / "out").exists()


def test_a_decoder_learns_several_labels_from_messages(place: Place, tmp_path: Path) -> None:
    build_model(tmp_path / "llama")
    records = [
        {"messages": [{"role": "user", "content": r["text"]}], "label": r["label"]}
        for r in make_labelled(30, kind="multi_label")
    ]
    write_jsonl(tmp_path / "train.jsonl", records)
    overrides = [
        *(f"model.path={tmp_path / 'llama'}", f"data.train={tmp_path / 'train.jsonl'}", "data.heldout=[]"),
        *("head.kind=multi_label", "data.max_length=128", "schedule.max_steps=3"),
    ]
    done = place.train("several", *overrides, ranks=2)
    assert [process.returncode for process in done] == [0, 0], done[0].stdout
    exported = place.verb("export", str(place.folder / "several"), "--output", str(tmp_path / "model"))
    assert "probe logits equal the sharded model's" in exported.stdout, exported.stderr
    losses = [entry["loss"] for entry in place.steps("several")]
    assert losses[-1] < losses[0]
