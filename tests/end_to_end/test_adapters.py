"""A run with adapters through the command line: trained on two ranks, exported both ways, scored, refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.config import load_config
from sft_dist.errors import ConfigError
from sft_dist.model.probe import plain_logprobs
from sft_dist.train import checkpoint
from sft_dist.training import _initial_weights
from tests.end_to_end.conftest import Place, make_place

pytestmark = pytest.mark.slow

ADAPTER = {"kind": "dora", "rank": 4, "alpha": 8.0, "dropout": 0.1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run of four steps, stopped after two and resumed, and its two exports."""
    place = make_place(tmp_path_factory.mktemp("adapters"), adapter=ADAPTER, optimizer={"learning_rate": 3e-2})
    for more in (["checkpoint.stop_at_step=2"], []):
        done = place.train("run", "schedule.max_steps=4", *more)
        assert [process.returncode for process in done] == [75 if more else 0] * 2, done[0].stdout
    assert "dora of rank 4 (alpha / rank, alpha 8) beside 12 linear layers" in done[0].stdout
    assert "parameters are trained" in done[0].stdout and "resumed from" in done[0].stdout
    for name, options in (("adapter", []), ("merged", ["--merge"])):
        told = place.verb("export", str(place.folder / "run"), "--output", str(place.folder / name), *options)
        assert told.returncode == 0, told.stdout + told.stderr
        assert "probe log-probs equal the sharded model's" in told.stdout
    return place


def found(place: Place) -> Any:
    return checkpoint.find(place.folder / "run", "best-or-last")


def logprobs(place: Place, model: Any) -> list[float]:
    samples = found(place).manifest["probe"]["samples"]
    return [value for ids in samples for value in plain_logprobs(model.eval(), ids)]


def test_plain_peft_loads_the_adapters_and_plain_transformers_the_whole(trained: Place) -> None:
    expected = found(trained).manifest["probe"]["logprobs"]
    base = AutoModelForCausalLM.from_pretrained(trained.folder / "model")
    before = logprobs(trained, base)
    with_adapters = logprobs(trained, PeftModel.from_pretrained(base, trained.folder / "adapter"))
    merged = logprobs(trained, AutoModelForCausalLM.from_pretrained(trained.folder / "merged"))
    assert with_adapters == pytest.approx(expected, abs=1e-4)
    assert merged == pytest.approx(expected, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(before, expected, strict=True)) > 0.1, "and they do something"


def test_an_adapter_folder_is_small_and_says_where_its_base_is(trained: Place) -> None:
    folder = trained.folder / "adapter"
    described = json.loads((folder / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(trained.folder / "model")
    assert (described["r"], described["lora_alpha"], described["use_dora"]) == (4, 8, True)
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.transformer.h.") and "lora_" in name for name in weights)
    assert not (folder / "config.json").exists() and not list(folder.glob("model*"))
    for name in ("adapter", "merged"):
        tokenizer = AutoTokenizer.from_pretrained(trained.folder / name)
        assert tokenizer.chat_template == found(trained).manifest["template"]


def test_checkpoints_are_of_the_size_of_the_adapters(trained: Place) -> None:
    num_trained = sum(v.numel() for v in load_file(trained.folder / "adapter" / "adapter_model.safetensors").values())
    held = found(trained).manifest["files"].values()
    per_file = 30_000  # names and shapes
    assert sum(file["num_bytes"] for file in held) < 12 * num_trained + per_file * len(held)


def test_a_run_scores_as_its_merged_model(trained: Place) -> None:
    answers = []
    for name in ("run", "merged"):
        output = trained.folder / f"{name}.jsonl"
        done = trained.verb(
            "score", str(trained.run_file), "--model", str(trained.folder / name), "--output", str(output)
        )
        assert done.returncode == 0, done.stderr
        answers.append(
            [turn["logprob"] for line in output.read_text().splitlines() for turn in json.loads(line)["turns"]]
        )
    assert answers[0] == pytest.approx(answers[1], abs=1e-3) and len(answers[0]) > 10


def test_a_run_answers_as_its_merged_model(trained: Place) -> None:
    told = [
        trained.verb("generate", "--model", str(trained.folder / n), "--prompt", "joke", "--max-new-tokens", "12")
        for n in ("run", "merged")
    ]
    assert [one.returncode for one in told] == [0, 0], told[0].stderr
    assert told[0].stdout == told[1].stdout


def test_evaluation_is_of_the_run_whatever_the_run_file_says_of_adapters(trained: Place) -> None:
    output = trained.folder / "evaluation.json"
    line = ["evaluate", str(trained.run_file), f"run_dir={trained.folder / 'run'}", "--checkpoint", "last"]
    done = trained.verb(*line, "adapter={}", "--output", str(output))
    assert done.returncode == 0, done.stderr
    (point,) = json.loads(output.read_text())["points"]
    summary = json.loads((trained.folder / "run" / "summary.json").read_text())
    assert point["heldout"]["all"]["nll"] == pytest.approx(summary["heldout_nll_after"], abs=1e-5)
    assert abs(summary["heldout_nll_after"] - summary["heldout_nll_before"]) > 0.01


def test_nothing_lies_between_the_pre_trained_model_and_adapters(trained: Place) -> None:
    """A and B on their own lines are no point of the line of their product."""
    run = trained.folder / "run"
    for command in (
        ["evaluate", str(trained.run_file), f"run_dir={run}", "--interpolate", "1,0.5"],
        ["export", str(run), "--output", str(trained.folder / "between"), "--interpolate", "0.5"],
    ):
        done = trained.verb(*command)
        assert done.returncode == 78, (command, done.stdout, done.stderr)
        assert "holds adapters, which the pre-trained model lacks: nothing lies between" in done.stderr
    assert not (trained.folder / "between").exists()


def test_verify_compares_a_model_with_adapters(trained: Place) -> None:
    done = trained.verb("verify", str(trained.run_file), f"run_dir={trained.folder / 'unused'}", "--num", "4")
    assert done.returncode == 0 and "verify: all is as it must be" in done.stdout, done.stdout + done.stderr


def test_edited_base_weights_are_refused_by_name(trained: Place, tmp_path: Path) -> None:
    """To resume, to export, to score and to evaluate: the checkpoint holds nothing of the base."""
    for name in ("model", "run"):
        shutil.copytree(trained.folder / name, tmp_path / name)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    saved["model"]["path"] = str(tmp_path / "model")
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    weights = {name: value + 0.01 for name, value in load_file(tmp_path / "model" / "model.safetensors").items()}
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    overrides = [f"model.path={tmp_path / 'model'}", f"run_dir={tmp_path / 'run'}"]
    commands = [
        ["train", str(trained.run_file), *overrides],
        ["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")],
        ["score", str(trained.run_file), "--model", str(tmp_path / "run"), "--output", str(tmp_path / "scores")],
        ["generate", "--model", str(tmp_path / "run"), "--prompt", "x"],
        ["evaluate", str(trained.run_file), *overrides],
    ]
    for command in commands:
        done = trained.verb(*command)
        assert done.returncode == 78, (command, done.stdout, done.stderr)
        assert "other weights than the adapters were trained beside" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"dropout": 0.5}, None),
        ({"alpha": 16.0}, "adapter.alpha: 8.0, this run file has 16.0"),
        ({"kind": "none"}, "adapter.kind: dora, this run file has none"),
    ],
)
def test_a_run_starts_from_another_with_the_same_adapters_only(
    trained: Place, tmp_path: Path, change: dict[str, Any], told: str | None
) -> None:
    tree = yaml.safe_load(trained.run_file.read_text())
    tree["adapter"] = ADAPTER | change
    tree["model"]["init_from"] = str(trained.folder / "run")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tmp_path / "run.yaml")
    if told is None:
        assert _initial_weights(config, print) == checkpoint.find(trained.folder / "run", "last").folder
        return
    with pytest.raises(ConfigError, match=told):
        _initial_weights(config, print)


def test_rounding_a_merged_model_is_said(trained: Place) -> None:
    output = trained.folder / "rounded"
    options = ["--merge", "--dtype", "bfloat16"]
    done = trained.verb("export", str(trained.folder / "run"), "--output", str(output), *options)
    assert done.returncode == 0 and "note: rounding from float32 to bfloat16 moves a probe token" in done.stderr
    assert all(value.dtype is torch.bfloat16 for value in load_file(output / "model.safetensors").values())
