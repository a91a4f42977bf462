"""`sft-dist verify`: it passes on what is right, and every line of it fails on the fault it is there for."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft_dist import verify
from sft_dist.config import DataConfig, ModelConfig, RunConfig
from sft_dist.preparation import training_set
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import CHATML, build_model
from tests.helpers.worlds import run_ranks

LINES = ("rendering", "spans", "packing", "decomposition", "layout")
# What earlier turns thought is not shown again, so one sequence cannot hold all contexts.
FORGETS_REASONING = CHATML.replace(
    "message['content']",
    "(message['content'] if loop.last or message['role'] != 'assistant' else message['content'].split('</t>')[-1])",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    for family in ("llama", "gpt2"):
        build_model(folder / family, family, dropout=0.1)
    write_jsonl(folder / "train.jsonl", make_records(30, max_words=8))
    return folder


def run_file(folder: Path, **model: Any) -> Path:
    tree = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(folder / "llama")} | model,
        "data": {"train": str(folder / "train.jsonl"), "max_length": 384, "num_processes": 1},
        "objective": {"normalise": "turn", "neftune_alpha": 5.0},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def verdicts(process: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return dict(re.findall(rf"^  ({'|'.join(LINES)}) +(ok|FAILED)", process.stdout, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "model"), [(1, {"dtype": "bfloat16"}), (2, {}), (2, {"family": "gpt2", "gradient_checkpointing": False})]
)
def test_what_is_right_passes(folder: Path, tmp_path: Path, ranks: int, model: dict[str, Any]) -> None:
    """With dropout in the model and noise in the run file, which are left out of the comparison."""
    options = [f"data.cache_dir={tmp_path}", f"model.path={folder / model.pop('family', 'llama')}"]
    done = run_ranks(ranks, ["-m", "sft_dist", "verify", str(run_file(folder, **model)), *options])
    assert [process.returncode for process in done] == [0] * ranks, done[0].stdout
    assert verdicts(done[0]) == dict.fromkeys(LINES, "ok"), done[0].stdout
    assert verdicts(done[0]).keys() == set(LINES)
    assert "8 of 30 samples" in done[0].stdout and f"on {ranks} rank(s), dropout off" in done[0].stdout
    if ranks > 1:
        assert verdicts(done[1]) == {}, "one rank speaks"
    assert not (folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "lines"),
    [
        ("mixes_conversations", {"packing", "decomposition", "layout"}),
        ("looks_ahead", {"decomposition"}),
        ("mean_of_means", {"layout"}),
        ("remembers_gradients", {"layout"}),
        ("another_template", {"rendering"}),
        ("another_tokenizer", {"rendering", "spans"}),
        ("forgets_the_stop_token", {"spans"}),
    ],
)
def test_every_fault_fails_its_lines_and_no_other(folder: Path, tmp_path: Path, fault: str, lines: set[str]) -> None:
    arguments = ["verify", str(run_file(folder)), f"data.cache_dir={tmp_path}", "--num", "6"]
    (done,) = run_ranks(1, ["-m", "tests.helpers.broken_verify", fault, *arguments])
    assert done.returncode == 78, done.stdout
    found = verdicts(done)
    assert {name for name, verdict in found.items() if verdict == "FAILED"} == lines, done.stdout
    assert found.keys() == set(LINES)
    assert f"verify: {', '.join(name for name in LINES if name in lines)} FAILED" in done.stdout
    if "rendering" in lines:
        assert re.search(r"train\.jsonl:\d+: message \d+: from token", done.stdout), "the place is named"


def rendering(folder: Path, tmp_path: Path, records: list[dict[str, Any]], **data: Any) -> list[verify.Check]:
    config = RunConfig(
        run_dir="unused",
        model=ModelConfig(path=str(folder / "llama")),
        data=DataConfig(
            train=({"path": str(write_jsonl(tmp_path / "train.jsonl", records))},),
            cache_dir=str(tmp_path / "prepared"),
            num_processes=1,
            max_length=400,
            **data,
        ),
    )
    selection, _ = training_set(config)
    return verify.check_rendering(config, selection, verify.choose(selection, 8))


def chat(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]}


def test_differences_that_are_meant_are_counted_by_reason(folder: Path, tmp_path: Path) -> None:
    records = [
        chat("hello", "fine"),
        chat("say <|im_end|>", "no", "why <|im_start|>?", "because"),
        # At inference the first answer begins after its header; the tokenizer alone would merge the newlines.
        chat("hello", "\n\nfine", "more", "no"),
    ]
    contexts, spans = rendering(folder, tmp_path, records)
    assert contexts.is_ok and spans.is_ok, (contexts, spans)
    assert "2 with equal ids" in contexts.compared
    assert "2 in which text that looks like control tokens stays text" in contexts.compared
    assert "1 cut where an earlier answer begins" in contexts.compared
    assert spans.compared.endswith("of 5")


def test_a_template_that_rewrites_history_and_asks_for_the_date_is_compared_turn_by_turn(
    folder: Path, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ '<|im_start|>system\n' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + FORGETS_REASONING)
    records = [chat("a", "<t>one</t>two", "b", "<t>three</t>four", "c", "five"), chat("a", "b")]
    contexts, spans = rendering(folder, tmp_path, records, chat_template=str(template), date="1999-12-31")
    assert contexts.is_ok and spans.is_ok, (contexts, spans)
    assert "4 with equal ids" in contexts.compared


def test_plain_texts_given_tokens_and_other_formats_are_compared_as_well(folder: Path, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"text": "plain words"}, {"text": "that write <|im_end|> out"}]
    contexts, spans = rendering(folder, tmp_path, records)
    assert contexts.is_ok and "1 with equal ids" in contexts.compared and "1 in which text" in contexts.compared
    assert spans.compared.endswith("of 0"), "a text has no answers"
    contexts, _ = rendering(folder, tmp_path, [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, -100]}])
    assert contexts.is_ok and contexts.compared.endswith("1 with equal ids")
    contexts, spans = rendering(folder, tmp_path, [{"instruction": "say it", "input": "twice", "output": "it it"}])
    assert contexts.is_ok and contexts.compared.endswith("1 with equal ids") and spans.compared.endswith("of 1")


def test_the_choice_covers_short_long_many_turns_and_history_that_is_rewritten(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(FORGETS_REASONING)
    records = [chat("word " * n, "x") for n in range(2, 30)]
    records[7] = chat(*["a", "b"] * 6)
    records[11] = chat("a", "<t>one</t>two", "b", "c")
    data = DataConfig(
        train=({"path": str(write_jsonl(tmp_path / "train.jsonl", records))},),
        chat_template=str(template),
        cache_dir=str(tmp_path / "prepared"),
        num_processes=1,
        max_length=384,
    )
    config = RunConfig(run_dir="unused", model=ModelConfig(path=str(folder / "llama")), data=data)
    selection, _ = training_set(config)
    for num in (4, 8):
        chosen = verify.choose(selection, num)
        assert len(chosen) == len(set(chosen)) == num
        assert {selection.lengths.min(), selection.lengths.max()} <= set(selection.lengths[chosen])
        assert {7, 11} <= set(selection.indices[chosen].tolist())
    assert sorted(verify.choose(selection, 1000)) == list(range(len(selection))), "no more than there are"


def test_a_difference_that_is_no_number_is_a_failure() -> None:
    assert not verify.Check("packing", "", float("nan"), 1e-3, "nats").is_ok
    assert not verify.Check("packing", "", 2e-3, 1e-3, "nats").is_ok
    assert verify.Check("packing", "", 1e-3, 1e-3, "nats").is_ok
