"""`sft-dist score` through the command line: several models, ranks, candidates, and every way of being interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.end_to_end.conftest import Place
from tests.helpers import oracle
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import FAMILIES, build_model
from tests.helpers.worlds import ROOT, run_ranks, start_ranks

pytestmark = pytest.mark.slow

NUM_LONG_RUN = 240
QUESTIONS: list[dict[str, Any]] = [
    {"id": "q0", "prompt": "What is the capital of France?", "candidates": ["Paris", "London", "Paris, of course."]},
    {"id": "q1", "prompt": [{"role": "system", "content": "rain"}, {"role": "user", "content": "?"}]}
    | {"candidates": [f"number {i}" for i in range(70)]},
]


@pytest.fixture(scope="module")
def scoring(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Three model families with one tokenizer, conversations, questions and a run file."""
    folder = tmp_path_factory.mktemp("scoring")
    for family in FAMILIES:
        build_model(folder / family, family)
    write_jsonl(folder / "few.jsonl", make_records(14, max_words=8))
    write_jsonl(folder / "many.jsonl", make_records(NUM_LONG_RUN, seed=5, max_words=8))
    write_jsonl(folder / "questions.jsonl", QUESTIONS)
    tree = {
        "run_dir": "unused",
        "model": {"path": str(folder / "llama")},
        "data": {"max_length": 384, "cache_dir": str(folder / "prepared"), "num_processes": 1},
        "batch": {"packs_per_micro_batch": 2},
    }
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree))
    return Place(folder, run_file)


def command(place: Place, data: str, output: Path, *options: str) -> list[str]:
    return ["score", str(place.run_file), "--data", str(place.folder / data), "--output", str(output), *options]


def score(place: Place, data: str, output: Path, *options: str, ranks: int = 1) -> list[dict[str, Any]]:
    if ranks == 1:
        done = [place.verb(*command(place, data, output, *options))]
    else:
        done = run_ranks(ranks, ["-m", "sft_dist", *command(place, data, output, *options)])  # type: ignore[arg-type]
    assert [process.returncode for process in done] == [0] * ranks, done[0].stdout + (done[0].stderr or "")
    return lines_of(output)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def found(scoring: Place) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """(kind of data, family, ranks) -> lines; llama and gpt2 in one call, qwen2 (which transformers gives a
    tokenizer of its own) in another."""
    answers = {}
    for ranks in (1, 2):
        for data in ("few", "questions"):
            for families in (("llama", "gpt2"), ("qwen2",)):
                output = scoring.folder / f"{data}-{families[0]}-{ranks}.out"
                paths = [str(scoring.folder / family) for family in families]
                models = [word for path in paths for word in ("--model", path)]
                lines = score(scoring, f"{data}.jsonl", output, *models, "--tokens", "--block-items", "5", ranks=ranks)
                for family, path in zip(families, paths, strict=True):
                    answers[data, family, ranks] = [
                        {key: line[key] for key in ("id", "index", "source")} | line["models"][path]
                        if len(families) > 1
                        else line
                        for line in lines
                    ]
    return answers


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_and_tokens_score_as_in_separate_passes(
    scoring: Place, found: dict[tuple[str, str, int], list[dict[str, Any]]], family: str, ranks: int
) -> None:
    model, tokenizer = oracle.load(scoring.folder / family)
    records = lines_of(scoring.folder / "few.jsonl")
    lines = found["few", family, ranks]
    assert [line["id"] for line in lines] == [record["id"] for record in records]
    for record, line in zip(records, lines, strict=True):
        pairs = oracle.turn_contexts(tokenizer, record["messages"])
        assert [turn["turn"] for turn in line["turns"]] == list(range(1, len(pairs) + 1))
        for turn, (context, output) in zip(line["turns"], pairs, strict=True):
            with torch.no_grad():
                expected = oracle._output_logprobs(model, context, output)
            assert turn["tokens"]["ids"] == output
            assert turn["tokens"]["logprobs"] == pytest.approx(expected.tolist(), abs=1e-3, rel=1e-5)
            assert turn["logprob"] == pytest.approx(float(expected.sum()), abs=1e-3, rel=1e-5)
            assert turn["first_logprob"] == turn["tokens"]["logprobs"][0]
            assert turn["stop_logprob"] == turn["tokens"]["logprobs"][-1]
            assert turn["tokens"]["texts"][-1] == "<|im_end|>"
            assert record["messages"][turn["message"] - 1]["role"] == turn["role"] == "assistant"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_score_as_in_separate_passes(
    scoring: Place, found: dict[tuple[str, str, int], list[dict[str, Any]]], family: str, ranks: int
) -> None:
    model, tokenizer = oracle.load(scoring.folder / family)
    for record, line in zip(QUESTIONS, found["questions", family, ranks], strict=True):
        prompt = record["prompt"]
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        entries = line["candidates"]
        expected = [
            oracle.turn_logprobs(model, tokenizer, [*before, {"role": "assistant", "content": text}])[-1]
            for text in record["candidates"]
        ]
        assert [entry["num_tokens"] for entry in entries] == [count for count, _ in expected]
        sums = [value for _, value in expected]
        assert [entry["logprob"] for entry in entries] == pytest.approx(sums, abs=1e-3, rel=1e-5)
        posterior = torch.tensor(sums, dtype=torch.float64).softmax(0).tolist()
        assert [entry["posterior"] for entry in entries] == pytest.approx(posterior, abs=1e-3)


def test_several_models_in_one_call_are_the_single_calls_side_by_side(
    scoring: Place, found: dict[tuple[str, str, int], list[dict[str, Any]]], tmp_path: Path
) -> None:
    """The same blocks and packs, so the same floats."""
    for family in ("llama", "gpt2"):
        path = str(scoring.folder / family)
        options = ["--model", path, "--tokens", "--block-items", "5"]
        for data in ("few", "questions"):
            single = score(scoring, f"{data}.jsonl", tmp_path / f"{family}-{data}", *options)
            assert single == found[data, family, 1]


def test_models_of_other_tokenizers_are_not_scored_together(scoring: Place, tmp_path: Path) -> None:
    other = build_model(tmp_path / "other", "llama")
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template.replace("<|im_end|>\n", "<|im_end|>"))
    models = ["--model", str(scoring.folder / "llama"), "--model", str(other)]
    done = scoring.verb(*command(scoring, "few.jsonl", tmp_path / "o", *models))
    assert done.returncode == 78 and "another tokenizer or chat template" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def uninterrupted(scoring: Place) -> bytes:
    output = scoring.folder / "whole.out"
    score(scoring, "many.jsonl", output, "--block-items", "4", ranks=2)
    return output.read_bytes()


def interrupt(place: Place, output: Path, number: signal.Signals, after_blocks: int) -> list[tuple[int, str]]:
    """(exit code, what was said) of two ranks that get a signal once that many more blocks are in the journal."""
    journal = Path(f"{output}.journal")
    target = done_so_far(journal) + 4 * after_blocks
    ranks = start_ranks(2, ["-m", "sft_dist", *command(place, "many.jsonl", output, "--block-items", "4")])
    try:
        deadline = time.monotonic() + 240
        while done_so_far(journal) < target and time.monotonic() < deadline:
            assert all(rank.poll() is None for rank in ranks)
            time.sleep(0.002)
        for rank in ranks:
            os.kill(rank.pid, number)
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert target <= done_so_far(journal) < NUM_LONG_RUN and not output.exists()
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


def test_the_launcher_passes_the_signal_on_and_gives_its_code(
    scoring: Place, uninterrupted: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    options = command(scoring, "many.jsonl", output, "--block-items", "4")[2:]
    words = [str(Path(sys.executable).parent / "sft-launch"), "run", str(scoring.run_file), "--nproc", "2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def launch() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*words, "--verb", "score", "--", *options],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    launcher = launch()
    try:
        deadline = time.monotonic() + 240
        while not done_so_far(Path(f"{output}.journal")) and time.monotonic() < deadline:
            time.sleep(0.002)
        launcher.terminate()
        said, _ = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode == 128 + signal.SIGTERM, said
    assert "the same command goes on from there" in said and not output.exists()
    again = launch()
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "going on from there" in said, said
    assert output.read_bytes() == uninterrupted


def done_so_far(journal: Path) -> int:
    return int(json.loads(journal.read_text())["parts"][0]["num_done"]) if journal.exists() else 0


def test_killed_and_stopped_at_any_instant_the_same_command_goes_on_to_the_same_bytes(
    scoring: Place, uninterrupted: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    interrupt(scoring, output, signal.SIGKILL, 2)
    (code, text), (other_code, other_text) = interrupt(scoring, output, signal.SIGINT, 1)
    assert code == other_code == 128 + signal.SIGINT, text + other_text
    assert "SIGINT: what is scored so far is kept" in text and "Traceback" not in text + other_text
    other = scoring.verb(*command(scoring, "many.jsonl", output, "--tokens"))
    assert other.returncode == 78 and "tokens: False there, True now" in other.stderr, other.stderr
    # What is done is not done again: a mark in it survives.
    partial = Path(f"{output}.partial-1")
    content = partial.read_bytes()
    assert content.startswith(b'{"id": "c0"')
    partial.write_bytes(content.replace(b'"c0"', b'"C0"', 1) + b'{"id": "torn')
    done = run_ranks(2, ["-m", "sft_dist", *command(scoring, "many.jsonl", output, "--block-items", "4")])
    assert [process.returncode for process in done] == [0, 0], done[0].stdout
    assert "are scored; going on from there" in done[0].stdout
    assert output.read_bytes() == uninterrupted.replace(b'"c0"', b'"C0"', 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_the_order_is_that_of_the_input_and_the_summary_counts_everything(scoring: Place, uninterrupted: bytes) -> None:
    lines = [json.loads(line) for line in uninterrupted.splitlines()]
    assert [line["id"] for line in lines] == [f"c{number}" for number in range(NUM_LONG_RUN)]
    assert [line["index"] for line in lines] == list(range(NUM_LONG_RUN))
