"""Bad input: one clear message, the documented exit code, no traceback, nothing half-written, nothing hanging."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.end_to_end.conftest import Place, make_place
from tests.helpers.worlds import rank_environment, run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = make_place(tmp_path_factory.mktemp("bad"))
    folder = place.folder
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"messages": [}\n')
    (folder / "latin1.jsonl").write_bytes(b'{"prompt": "caf\xe9", "completion": "x"}\n')
    (folder / "no_assistant.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
    (folder / "bot.jsonl").write_text('{"messages": [{"role": "bot", "content": "x"}]}\n')
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "long " * 99, "completion": "x"}))
    (folder / "a_file").write_text("x")
    shutil.copytree(folder / "model", folder / "no_tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / "no_tokenizer" / name).unlink(missing_ok=True)
    shutil.copytree(folder / "model", folder / "no_template")
    (folder / "no_template" / "chat_template.jinja").unlink()
    shutil.copytree(folder / "model", folder / "no_weights")
    (folder / "no_weights" / "model.safetensors").unlink()
    shutil.copytree(folder / "model", folder / "deeper")
    config = json.loads((folder / "deeper" / "config.json").read_text()) | {"n_layer": 4}
    (folder / "deeper" / "config.json").write_text(json.dumps(config))
    shutil.copytree(folder / "model", folder / "fewer_rows")
    smaller = AutoModelForCausalLM.from_pretrained(folder / "model")
    smaller.resize_token_embeddings(50)
    smaller.save_pretrained(folder / "fewer_rows")
    (folder / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "optimizer": {}}))
    (folder / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    return place


CASES = [
    (["data.train={}/missing.jsonl"], 65, "missing.jsonl: no such file"),
    (["data.train={}/empty.jsonl"], 65, "the file is empty"),
    (["data.train={}/broken.jsonl"], 65, "broken.jsonl:1:15: not valid JSON"),
    (["data.train={}/latin1.jsonl"], 65, "latin1.jsonl:1:16: not valid UTF-8"),
    (["data.train={}/no_assistant.jsonl"], 65, "no assistant turn"),
    (["data.train={}/bot.jsonl"], 65, "role 'bot'"),
    (["data.max_length=3"], 65, "nothing is left to train on"),
    (["data.max_length=60", "data.overflow=error"], 65, "longer than data.max_length"),
    (["data.train=[]"], 78, "data.train: required"),
    (["model.path={}/no_tokenizer"], 78, "no tokenizer"),
    (["model.path={}/no_template"], 78, "no chat template"),
    (["model.path={}/no_weights"], 78, "weights cannot be loaded"),
    (["model.path={}/deeper"], 78, "would start at random"),
    (["model.path={}/fewer_rows"], 78, "but the model has embeddings for"),
    (["model.path={}/nowhere"], 78, "nowhere"),
    (["data.max_length=9999"], 78, "longer than the model's context"),
    (["data.max_lenght=9"], 78, "did you mean data.max_length?"),
    (["batch.global_packs=0"], 78, "batch.global_packs"),
    (["deepspeed={}/own.json"], 78, "optimizer is decided by"),
    (["deepspeed={}/zero1.json"], 78, "stage must be 3"),
    (["deepspeed=zero9"], 78, "those shipped: cpu, zero3, zero3_16bit"),
    (["data.max_length=60", "data.heldout={}/long.jsonl"], 65, "data.heldout: no sample has a target token"),
    (["checkpoint.resume=must"], 78, "no valid checkpoint"),
    (["run_dir={}/a_file/run"], 74, "cannot be written"),
    (["data.cache_dir={}/a_file/cache"], 74, "cannot be written"),
]


@pytest.mark.parametrize(("overrides", "code", "message"), CASES)
def test_one_message_and_the_documented_code(bad: Place, overrides: list[str], code: int, message: str) -> None:
    run_dir = f"run_dir={bad.folder / 'run'}"
    done = bad.verb("train", str(bad.run_file), run_dir, *[text.format(bad.folder) for text in overrides])
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("Error: ") == 1
    prepared = bad.folder / "prepared"
    # What is not finished says so in its name.
    assert all((p / "manifest.json").exists() for p in prepared.glob("*") if p.is_dir() and p.suffix != ".partial")


def test_new_parameters_may_start_at_random_where_they_are_named(bad: Place) -> None:
    overrides = [f"model.path={bad.folder}/deeper", "model.allow_new_parameters=['transformer.h.3.*']"]
    arguments = ["train", str(bad.run_file), f"run_dir={bad.folder / 'deeper_run'}", "schedule.max_steps=1"]
    done = bad.verb(*arguments, *overrides)
    assert done.returncode == 0, done.stderr
    # Only training gives them a meaning.
    scored = bad.verb("score", str(bad.run_file), *overrides, "--output", str(bad.folder / "scores"))
    assert scored.returncode == 78 and "would be random" in scored.stderr, scored.stderr
    options = ["--model", str(bad.folder / "deeper_run"), "--prompt", "x", "--max-new-tokens", "1"]
    assert bad.verb("generate", *options).returncode == 0


def test_a_fault_on_every_rank_ends_every_rank(bad: Place) -> None:
    arguments = ["-m", "sft_dist", "train", str(bad.run_file), f"run_dir={bad.folder / 'two'}"]
    done = run_ranks(2, [*arguments, f"data.train={bad.folder}/broken.jsonl"], timeout_s=60)
    assert [process.returncode for process in done] == [65, 65]


def test_a_port_in_use_is_told_by_the_rank_that_needs_it(bad: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "sft_dist", "train", str(bad.run_file), f"run_dir={bad.folder / 'port'}"],
            env=rank_environment(0, 2, port),
            capture_output=True,
            text=True,
            timeout=90,
        )
    assert done.returncode == 69, done.stderr
    assert f"port {port} of 127.0.0.1 is in use" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["trian", "x"], [], ["train"], ["score", "x.yaml"]])
def test_wrong_command_lines_are_usage_errors(bad: Place, arguments: list[str]) -> None:
    assert bad.verb(*arguments).returncode == 2


def test_score_refuses_an_output_it_cannot_write_before_any_work(bad: Place, tmp_path: Path) -> None:
    done = bad.verb("score", str(bad.run_file), "--output", str(tmp_path))
    assert done.returncode == 74 and "is a folder" in done.stderr
    gone = bad.verb("score", str(bad.run_file), "--data", "nofile.jsonl", "--output", str(tmp_path / "x"))
    assert gone.returncode == 65 and not list(tmp_path.iterdir())


def test_score_of_samples_longer_than_max_length_says_so(bad: Place, tmp_path: Path) -> None:
    sources = [str(bad.folder / "long.jsonl"), str(bad.folder / "heldout.jsonl")]
    done = bad.verb(
        "score", str(bad.run_file), "data.max_length=120", "--data", *sources, "--output", str(tmp_path / "x")
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "x").read_text().splitlines()]
    assert "left_out" in lines[0] and lines[0]["turns"] == [] and len(lines) == 11
    assert "too long" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "{}/no_tokenizer"], 78, "no tokenizer"),
        (["--model", "{}/no_template"], 78, "no chat template"),
        (["--model", "{}/nowhere"], 78, "nowhere"),
        (["--model", "{}/deeper"], 78, "would be random"),
        (["--model", "{}/model", "--max-new-tokens", "0"], 2, "from 1"),
        (
            ["--model", "{}/model", "--max-new-tokens", "510"],
            78,
            "510 are more than the model's context (512",
        ),
    ],
)
def test_generate_tells_what_is_missing(bad: Place, arguments: list[str], code: int, message: str) -> None:
    done = bad.verb("generate", "--prompt", "x", *[text.format(bad.folder) for text in arguments])
    assert done.returncode == code and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_export_of_something_else_is_refused(bad: Place, tmp_path: Path) -> None:
    done = bad.verb("export", str(bad.folder), "--output", str(tmp_path / "x"))
    assert done.returncode == 78 and "not a run folder" in done.stderr
    assert not (tmp_path / "x").exists()


def test_deepspeed_puts_local_rank_before_the_verb(bad: Place) -> None:
    done = bad.verb("--local_rank=0", "config", str(bad.run_file), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["seed"] == 3


def test_inspect_marks_trained_tokens(bad: Place) -> None:
    done = bad.verb("inspect", str(bad.run_file), "--id", "c0")
    assert done.returncode == 0, done.stderr
    answer = json.loads((bad.folder / "train.jsonl").read_text().splitlines()[0])["messages"][-1]["content"]
    assert f"⟦{answer}<|im_end|>⟧" in done.stdout
    assert "fill" in done.stdout and "lengths" in done.stdout
