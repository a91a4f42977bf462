"""A head beside the language model's through the command line: train on two ranks, predict, score, generate, export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.end_to_end.conftest import Place
from tests.helpers.conversations import write_jsonl
from tests.helpers.encoders import make_beside
from tests.helpers.models import build_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A decoder after a run `whole` on two ranks, with plain text among its sources and a set that tells retention."""
    folder = tmp_path_factory.mktemp("beside")
    build_model(folder / "model", "qwen2")
    write_jsonl(folder / "train.jsonl", make_beside(40))
    write_jsonl(folder / "heldout.jsonl", make_beside(12, seed=1))
    write_jsonl(folder / "replay.jsonl", [{"text": f"{number} cats and dogs in the rain"} for number in range(4)])
    tree = {
        "run_dir": "unused",
        "model": {"path": str(folder / "model")},
        "head": {"kind": "single_label", "language_model_weight": 0.5, "weight": 2.0, "learning_rate": 2e-2},
        "data": {
            "train": [str(folder / "train.jsonl"), str(folder / "replay.jsonl")],
            "heldout": str(folder / "heldout.jsonl"),
            "retention": str(folder / "replay.jsonl"),
            "max_length": 192,
            "cache_dir": str(folder / "prepared"),
            "num_processes": 1,
        },
        "batch": {"global_packs": 3},
        "optimizer": {"learning_rate": 5e-3},
        "schedule": {"epochs": 2, "max_steps": 4},
        "evaluate": {"every": 2},
        "checkpoint": {"every": 0, "keep": 100},
        "logging": {"tensorboard": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    place = Place(folder, folder / "run.yaml")
    done = place.train("whole")
    assert [process.returncode for process in done] == [0, 0], done[0].stdout
    said = done[0].stdout
    assert "a head for 4 output(s) beside that of Qwen2ForCausalLM; new parameters ω: score.weight" in said
    assert "20 conversations train the language model and the head; 14 without a label" in said
    assert "10 without a target token the head alone" in said
    return place


def entries(place: Place, kind: str) -> list[dict[str, Any]]:
    lines = (place.folder / "whole" / "metrics.jsonl").read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line))["kind"] == kind]


def test_both_are_learned_and_the_best_checkpoint_is_that_of_both(place: Place) -> None:
    tokens, labels = entries(place, "heldout"), entries(place, "heldout_head")
    assert [entry["step"] for entry in tokens] == [entry["step"] for entry in labels] == [0, 2, 4]
    assert tokens[-1]["nll"] < tokens[0]["nll"] and labels[-1]["loss"] < labels[0]["loss"]
    assert all(entry["count"] == 9 for entry in labels), "of twelve conversations three have no label"
    best = json.loads((place.folder / "whole" / "checkpoints" / "best.json").read_text())
    joint = {a["step"]: 0.5 * a["nll"] + 2.0 * b["loss"] for a, b in zip(tokens, labels, strict=True) if a["step"]}
    assert best["step"] == min(joint, key=lambda step: joint[step])
    assert best["heldout_nll"] == pytest.approx(min(joint.values()), rel=1e-6)
    assert [entry["step"] for entry in entries(place, "retention")] == [0, 2, 4]
    assert entries(place, "drift")[-1]["all"] > 0


def test_one_folder_is_a_plain_language_model_and_a_plain_classifier(place: Place, tmp_path: Path) -> None:
    run = str(place.folder / "whole")
    done = place.verb("export", run, "--output", str(tmp_path / "model"), "--checkpoint", "last")
    assert done.returncode == 0, done.stderr
    assert "log-probs and logits equal the sharded model's" in done.stdout
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert type(causal).__name__ == "Qwen2ForCausalLM"
    assert classifier.config.id2label == {0: "card", 1: "fee", 2: "money", 3: "other"}
    assert classifier.config.problem_type == "single_label_classification"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    records: list[dict[str, Any]] = make_beside(9, seed=2)
    records[0]["label"] = "never heard of"  # which prediction does not look at
    bad = [{"id": "empty", "messages": []}, {"id": "text", "text": "card"}]
    long = {"id": "long", "messages": [{"role": "user", "content": "card " * 200}]}
    write_jsonl(tmp_path / "new.jsonl", [*records[:3], *bad, long, *records[3:]])
    more = ("-o", str(tmp_path / "out"), "--checkpoint", "last")
    done = place.verb("predict", run, str(tmp_path / "new.jsonl"), *more)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    rest = [f"r{n}" for n in range(3, 9)]
    assert [line["id"] for line in lines] == ["r0", "r1", "r2", "new:4", "text", "long", *rest]
    assert [line["refused"] for line in lines[3:6]] == ["no messages", "no conversation", "too long"]
    answered = [line for line in lines if "refused" not in line]
    rows = [tokenizer.apply_chat_template(record["messages"], return_dict=False) for record in records]
    width = max(map(len, rows))
    padded = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    with torch.no_grad():
        mask = (torch.arange(width) < torch.tensor(list(map(len, rows)))[:, None]).long()
        shares = classifier(input_ids=padded, attention_mask=mask).logits.softmax(-1).tolist()
        hidden = [causal.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    for line, of_row, state in zip(answered, shares, hidden, strict=True):
        expected = dict(zip(classifier.config.id2label.values(), of_row, strict=True))
        assert line["probabilities"] == pytest.approx(expected, abs=1e-4)
        assert (classifier.score.weight @ state).softmax(-1).tolist() == pytest.approx(of_row, abs=1e-4)
    arguments = ("--model", run, "--model", str(tmp_path / "model"), "--data", str(place.folder / "replay.jsonl"))
    more = ("--output", str(tmp_path / "scores"), "--checkpoint", "last")
    done = place.verb("score", str(place.run_file), *arguments, *more)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "scores").read_text().splitlines()) == 4
    done = place.verb("generate", "--model", run, "--prompt", "card", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    evaluate = ["evaluate", str(place.run_file), f"run_dir={run}", "--checkpoint", "last"]
    done = place.verb(*evaluate, "--output", str(tmp_path / "evaluation"))
    assert done.returncode == 0, done.stderr
    (point,) = json.loads((tmp_path / "evaluation").read_text())["points"]
    assert point["heldout"]["all"]["nll"] == pytest.approx(entries(place, "heldout")[-1]["nll"], abs=1e-5)
    done = place.verb(*evaluate, "--interpolate", "0.5")
    assert done.returncode == 78 and "holds a head, which the pre-trained model lacks" in done.stderr, done.stderr
