"""A base model whose tokenizer knows no chat: control tokens from the run file to the export, on two ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.end_to_end.conftest import Place
from tests.helpers import oracle
from tests.helpers.bare import CHATML_TOKENS, build_bare_model
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import CHATML
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("control-tokens")
    build_bare_model(folder / "model", "qwen2", spare_rows=1, dropout=0.1)
    write_jsonl(folder / "train.jsonl", make_records(24, max_words=6))
    write_jsonl(folder / "heldout.jsonl", make_records(6, seed=1, max_words=6))
    (folder / "chat.jinja").write_text(CHATML)
    tree = {
        "run_dir": "unused",
        "model": {"path": str(folder / "model"), "control_tokens": list(CHATML_TOKENS)},
        "data": {
            "train": str(folder / "train.jsonl"),
            "heldout": str(folder / "heldout.jsonl"),
            "chat_template": str(folder / "chat.jinja"),
            "max_length": 480,
            "cache_dir": str(folder / "prepared"),
            "num_processes": 1,
        },
        "batch": {"global_packs": 3},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"epochs": 4, "max_steps": 4},
        "evaluate": {"every": 0},
        "checkpoint": {"every": 0, "keep_best": False},
    }
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree))
    return Place(folder, run_file)


@pytest.fixture(scope="module")
def trained(base: Place) -> Place:
    """A whole run `whole`, and one `stopped` that was stopped after two of its four steps and resumed."""
    for run, overrides, code in (("whole", [], 0), ("stopped", ["checkpoint.stop_at_step=2"], 75), ("stopped", [], 0)):
        done = base.train(run, *overrides)
        assert [process.returncode for process in done] == [code, code], done[0].stdout
        (base.folder / f"{run}-{code}.log").write_text(done[0].stdout)
    return base


@pytest.fixture(scope="module")
def exported(trained: Place) -> Path:
    done = trained.verb("export", str(trained.folder / "stopped"), "--output", str(trained.folder / "export"))
    assert done.returncode == 0, done.stderr
    return trained.folder / "export"


def test_it_is_said_once_and_a_stopped_run_is_the_same_bit_for_bit(trained: Place) -> None:
    said = (trained.folder / "whole-0.log").read_text()
    num = len(AutoTokenizer.from_pretrained(trained.folder / "model"))
    assert said.count("added 2 control tokens (<|im_start|>, <|im_end|>): embeddings") == 1
    assert f"{num + 1} -> {num + 2} rows, new rows are the mean of the {num} old ones" in said
    assert "2 of 4 steps are done" in (trained.folder / "stopped-0.log").read_text()
    expected, found = trained.state("whole", 4), trained.state("stopped", 4)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_plain_transformers_loads_the_export_and_scores_like_score(trained: Place, exported: Path) -> None:
    model, tokenizer = oracle.load(exported)
    before = AutoTokenizer.from_pretrained(trained.folder / "model")
    ids = [len(before), len(before) + 1]
    assert tokenizer.convert_tokens_to_ids(list(CHATML_TOKENS)) == ids and len(tokenizer) == len(before) + 2
    assert tokenizer.chat_template == CHATML
    assert tokenizer.decode([ids[0], 50, ids[1]], skip_special_tokens=True) == tokenizer.decode([50])
    assert model.config.vocab_size == len(before) + 2 == len(model.get_input_embeddings().weight)
    stops = GenerationConfig.from_pretrained(exported).eos_token_id
    assert ids[1] in (stops if isinstance(stops, list) else [stops])
    original = AutoModelForCausalLM.from_pretrained(trained.folder / "model")
    mean = original.get_output_embeddings().weight[: len(before)].detach().double().mean(0)
    tuned = model.get_output_embeddings().weight[ids[1]].detach()
    assert (tuned - mean).abs().max() > 1e-3, "the row of the stop token was trained"
    assert (tuned - mean).abs().max() < 0.2, "and started from the mean: four steps of 1e-2 at most"

    outputs = {name: trained.folder / f"scores-{name}.jsonl" for name in ("run", "export")}
    from_run = ["score", str(trained.run_file), "--model", str(trained.folder / "stopped"), "--output"]
    done = run_ranks(2, ["-m", "sft_dist", *from_run, str(outputs["run"])])
    assert [process.returncode for process in done] == [0, 0], done[0].stdout
    one = trained.verb(*from_run[:3], str(exported), "--output", str(outputs["export"]))
    assert one.returncode == 0, one.stderr
    records = [json.loads(line) for line in (trained.folder / "heldout.jsonl").read_text().splitlines()]
    for output in outputs.values():
        for record, line in zip(records, map(json.loads, output.read_text().splitlines()), strict=True):
            expected = oracle.turn_logprobs(model, tokenizer, record["messages"])
            assert [turn["num_tokens"] for turn in line["turns"]] == [count for count, _ in expected]
            found = [turn["logprob"] for turn in line["turns"]]
            assert found == pytest.approx([value for _, value in expected], abs=1e-3, rel=1e-5)


def test_generate_answers_alike_from_run_and_export(trained: Place, exported: Path) -> None:
    common = ("--prompt", "the weather", "--max-new-tokens", "8")
    answers = [trained.verb("generate", "--model", str(m), *common) for m in (exported, trained.folder / "stopped")]
    assert [answer.returncode for answer in answers] == [0, 0], answers[0].stderr
    assert answers[0].stdout == answers[1].stdout


def test_another_run_starts_from_the_weights_with_the_same_tokens_only(trained: Place, exported: Path) -> None:
    start = f"model.init_from={trained.folder / 'whole'}"
    one_step = ["schedule.max_steps=1"]
    done = trained.train("from-run", start, *one_step, ranks=1)
    assert done[0].returncode == 0, done[0].stdout
    summary = json.loads((trained.folder / "whole" / "summary.json").read_text())
    started = json.loads((trained.folder / "from-run" / "summary.json").read_text())
    assert started["heldout_nll_before"] == pytest.approx(summary["heldout_nll_after"], abs=1e-5)
    for tokens in ("[]", "['<|im_end|>', '<|im_start|>']", "['<|im_start|>', '<|other|>', '<|im_end|>']"):
        # With `[]` the markers would be text: a template of the tokens that are there lets it get as far.
        template = trained.folder / "eos.jinja"
        template.write_text(CHATML.replace("<|im_end|>", "<|endoftext|>"))
        options = [start, f"model.control_tokens={tokens}", f"data.chat_template={template}", *one_step]
        refused = trained.train("from-other", *options, ranks=1)
        assert refused[0].returncode == 78, refused[0].stdout
        assert "trained with model.control_tokens: ['<|im_start|>', '<|im_end|>']" in refused[0].stdout
    # The mend that the message names.
    done = trained.train("from-export", f"model.path={exported}", *one_step, ranks=1)
    assert done[0].returncode == 0, done[0].stdout
    assert "added" not in done[0].stdout
    started = json.loads((trained.folder / "from-export" / "summary.json").read_text())
    assert started["heldout_nll_before"] == pytest.approx(summary["heldout_nll_after"], abs=1e-5)


def test_resuming_with_other_tokens_is_refused_by_name(trained: Place) -> None:
    shutil.copytree(trained.folder / "whole", trained.folder / "other")
    done = trained.train("other", "model.control_tokens=['<|im_start|>', '<|im_end|>', '<|x|>']")
    assert {process.returncode for process in done} == {78}, done[0].stdout
    assert "model.control_tokens: ['<|im_start|>', '<|im_end|>'] in the checkpoint" in done[0].stdout


def test_without_control_tokens_the_error_names_the_mend(base: Place) -> None:
    """The template's markers would be ordinary text, and no answer would end."""
    done = base.train("without", "model.control_tokens=[]", ranks=1)
    assert done[0].returncode == 65, done[0].stdout
    assert "no stop token" in done[0].stdout and "model.control_tokens" in done[0].stdout


def test_the_users_model_folder_is_never_written(trained: Place, exported: Path, tmp_path: Path) -> None:
    again = build_bare_model(tmp_path / "again", "qwen2", spare_rows=1, dropout=0.1)
    found = {path.name: path.read_bytes() for path in (trained.folder / "model").iterdir()}
    assert found == {path.name: path.read_bytes() for path in again.iterdir()}
