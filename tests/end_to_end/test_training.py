"""The main job through the command line on two ranks: train, stop, resume, export, score."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.train import checkpoint
from sft_dist.train.lock import Holder
from tests.end_to_end.conftest import Place
from tests.helpers import oracle
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.worlds import free_port, rank_environment, run_ranks, start_ranks

pytestmark = pytest.mark.slow


def test_a_run_trains_evaluates_and_says_what_it_did(uninterrupted: Place) -> None:
    steps = uninterrupted.steps("whole")
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    summary = json.loads((uninterrupted.folder / "whole" / "summary.json").read_text())
    assert summary["heldout_nll_after"] < summary["heldout_nll_before"] - 0.3
    assert summary["conversations"] == 40 and summary["ranks"] == 2
    outcome = uninterrupted.outcome("whole")
    assert (outcome["exit_code"], outcome["step"]) == (0, 6)
    assert list((uninterrupted.folder / "whole" / "tensorboard").glob("events*"))


def test_every_step_says_how_fast_it_was_and_where_its_time_went(uninterrupted: Place) -> None:
    steps = uninterrupted.steps("whole")
    for entry in steps:
        assert entry["tokens_per_s"] == pytest.approx(entry["num_tokens"] / entry["step_time_s"])
        assert entry["target_tokens_per_s"] == pytest.approx(entry["num_target_tokens"] / entry["step_time_s"])
        assert 0 < entry["mfu"] < entry["mfu_palm"], "short samples: PaLM's formula counts squares of whole packs"
    lines = (uninterrupted.folder / "whole" / "metrics.jsonl").read_text().splitlines()
    times = [entry for line in lines if (entry := json.loads(line))["kind"] == "train_time"]
    assert [entry["step"] for entry in times] == [1, 2, 3, 4, 5, 6]
    for entry in times:
        shares = entry["shares"]
        assert sum(shares.values()) == pytest.approx(1.0)
        assert min(shares["forward"], shares["backward"], shares["step"]) > 0
        # An evaluation every second step, and each writes a best checkpoint as long as the NLL falls.
        assert (shares["evaluate"] > 0) == (entry["step"] % 2 == 0)
    summary = json.loads((uninterrupted.folder / "whole" / "summary.json").read_text())
    assert sum(summary["time_shares"].values()) == pytest.approx(1.0)
    assert summary["mfu"] == pytest.approx(
        sum(entry["mfu"] * entry["step_time_s"] for entry in steps) / sum(entry["step_time_s"] for entry in steps)
    )


def test_a_profile_of_a_few_steps_is_written_by_one_rank_and_changes_nothing(uninterrupted: Place) -> None:
    place = uninterrupted
    done = place.train("profiled", "--profile")
    assert [process.returncode for process in done] == [0, 0], _said(done)
    (trace,) = (place.folder / "profiled" / "profile").iterdir()
    assert str(trace) in done[0].stdout and str(trace) not in done[1].stdout
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"aten::mm", "ProfilerStep#2", "ProfilerStep#4"} <= names and "ProfilerStep#1" not in names
    assert [e["loss"] for e in place.steps("profiled")] == [e["loss"] for e in place.steps("whole")]


def test_a_run_too_short_for_a_profile_says_so(place: Place) -> None:
    done = place.train("short", "--profile", "schedule.max_steps=1", "evaluate.every=0", ranks=1)
    assert done[0].returncode == 0 and "no profile" in done[0].stdout, _said(done)


def test_stopping_at_every_step_changes_no_bit(uninterrupted: Place) -> None:
    """Dropout on, a step that does not divide over the ranks, the epoch's end inside the run."""
    place = uninterrupted
    for step in (1, 2, 3, 4, 5):
        done = place.train("stopped", f"checkpoint.stop_at_step={step}")
        assert [process.returncode for process in done] == [75, 75], _said(done)
        assert place.outcome("stopped")["exit_code"] == 75
    done = place.train("stopped")
    assert [process.returncode for process in done] == [0, 0], _said(done)
    assert "5 of 6 steps are done" in _said(done)
    expected, found = place.state("whole", 6), place.state("stopped", 6)
    assert expected.keys() == found.keys() and len(expected) > 6
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    losses = [entry["loss"] for entry in place.steps("whole")]
    assert [entry["loss"] for entry in place.steps("stopped")] == losses


def test_resuming_a_named_checkpoint_of_another_run(uninterrupted: Place) -> None:
    """And once the run has progress of its own, the same command goes on from that."""
    place = uninterrupted
    start = f"checkpoint.resume={place.folder / 'whole' / 'checkpoints' / 'step-00000004'}"
    stopped = place.train("by-path", start, "checkpoint.stop_at_step=5")
    assert [process.returncode for process in stopped] == [75, 75], _said(stopped)
    assert "4 of 6 steps are done" in stopped[0].stdout
    done = place.train("by-path", start)
    assert [process.returncode for process in done] == [0, 0], _said(done)
    assert "5 of 6 steps are done" in done[0].stdout
    expected, found = place.state("whole", 6), place.state("by-path", 6)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_folder_of_its_own_is_where_a_run_starts_again_only_once(uninterrupted: Place) -> None:
    place = uninterrupted
    shutil.copytree(place.folder / "whole", place.folder / "back")
    start = f"checkpoint.resume={place.folder / 'back' / 'checkpoints' / 'step-00000004'}"
    stopped = place.train("back", start, "checkpoint.stop_at_step=5", ranks=1)
    assert stopped[0].returncode == 75 and "4 of 6 steps are done" in stopped[0].stdout, _said(stopped)
    assert 6 not in checkpoint.step_folders(place.folder / "back"), "the other continuation is given up"
    done = place.train("back", start, ranks=1)
    assert done[0].returncode == 0 and "5 of 6 steps are done" in done[0].stdout, _said(done)


def test_where_no_checkpoint_can_be_used_none_is_removed(uninterrupted: Place) -> None:
    """A new start would publish its own, and what is there is worth a look first."""
    place = uninterrupted
    shutil.copytree(place.folder / "whole", place.folder / "unusable")
    folders = checkpoint.step_folders(place.folder / "unusable")
    for folder in folders.values():
        (folder / "shards").rename(folder / "elsewhere")
    done = place.train("unusable", ranks=1)
    assert done[0].returncode == 74 and "none of them can be used: to start anew" in done[0].stdout, _said(done)
    assert checkpoint.step_folders(place.folder / "unusable") == folders and len(folders) > 1


def test_export_loads_in_plain_transformers_and_scores_the_same(uninterrupted: Place, tmp_path: Path) -> None:
    place = uninterrupted
    of_the_user = tmp_path / "model.tmp" / "notes.txt"
    of_the_user.parent.mkdir()
    of_the_user.write_text("mine")
    done = place.verb("export", str(place.folder / "whole"), "--output", str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    assert of_the_user.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.tmp"]
    assert (tmp_path / "model").stat().st_mode == of_the_user.parent.stat().st_mode, "readable as any new folder"
    model, tokenizer = oracle.load(tmp_path / "model")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(place.folder / "model").chat_template
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    original = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    assert not torch.equal(model.transformer.wte.weight.float(), original.transformer.wte.weight)

    one = place.verb("score", str(place.run_file), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "1"))
    assert one.returncode == 0, one.stderr
    arguments = ["score", str(place.run_file), "--model", str(place.folder / "whole"), "--output", str(tmp_path / "2")]
    two = run_ranks(2, ["-m", "sft_dist", *arguments])
    assert [process.returncode for process in two] == [0, 0], _said(two)
    records = [json.loads(line) for line in (place.folder / "heldout.jsonl").read_text().splitlines()]
    from_export, from_shards = ([json.loads(x) for x in (tmp_path / n).read_text().splitlines()] for n in "12")
    assert [line["id"] for line in from_export] == [record["id"] for record in records]
    for record, first, second in zip(records, from_export, from_shards, strict=True):
        expected = oracle.turn_logprobs(model, tokenizer, record["messages"])
        for line in (first, second):
            assert [turn["num_tokens"] for turn in line["turns"]] == [count for count, _ in expected]
            for turn, (_, value) in zip(line["turns"], expected, strict=True):
                assert turn["logprob"] == pytest.approx(value, abs=1e-3, rel=1e-5)
            assert line["logprob"] == pytest.approx(sum(turn["logprob"] for turn in line["turns"]))


def test_a_bfloat16_run_resumes_and_exports_what_it_computed_with(place: Place, tmp_path: Path) -> None:
    half = ["model.dtype=bfloat16", "evaluate.every=0", "schedule.max_steps=3"]
    whole = place.train("half", *half)
    stopped = place.train("half-stopped", *half, "checkpoint.stop_at_step=2")
    assert [p.returncode for p in whole + stopped] == [0, 0, 75, 75], _said(whole + stopped)
    resumed = place.train("half-stopped", *half)
    assert [p.returncode for p in resumed] == [0, 0], _said(resumed)
    expected, found = place.state("half", 3), place.state("half-stopped", 3)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert any(value.dtype == torch.float32 for value in expected.values()), "master weights are float32"
    done = place.verb("export", str(place.folder / "half"), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_best_checkpoint_is_kept_and_a_rise_of_the_heldout_nll_is_said(place: Place) -> None:
    # Held-out answers of letters that the training data has not: learning makes them less likely.
    other = write_jsonl(place.folder / "other.jsonl", [{"prompt": "x", "completion": "QZQXJZQKVWQZ" * 3}] * 3)
    options = [f"data.heldout={other}", "schedule.warmup_fraction=0", "evaluate.every=1", "checkpoint.keep=1"]
    done = place.train("harsh", *options, ranks=1)
    assert done[0].returncode == 0, _said(done)
    lines = [json.loads(line) for line in (place.folder / "harsh" / "metrics.jsonl").read_text().splitlines()]
    nll = {entry["step"]: entry["nll"] for entry in lines if entry["kind"] == "heldout" and entry["step"]}
    best = min(nll, key=lambda step: nll[step])
    assert best < 6, nll
    assert "warning: held-out NLL rises" in done[0].stdout
    assert json.loads((place.folder / "harsh" / "checkpoints" / "best.json").read_text())["step"] == best
    kept = sorted(int(path.name[5:]) for path in (place.folder / "harsh" / "checkpoints").glob("step-*"))
    assert kept == [best, 6]


def test_without_keep_best_no_best_checkpoint_is_named_or_kept(place: Place) -> None:
    kept = ["evaluate.every=2", "checkpoint.keep=1"]
    stopped = place.train("was-best", *kept, "checkpoint.stop_at_step=3", ranks=1)
    checkpoints = place.folder / "was-best" / "checkpoints"
    assert stopped[0].returncode == 75 and (checkpoints / "best.json").exists(), _said(stopped)
    assert {path.name for path in checkpoints.glob("step-*")} == {"step-00000002", "step-00000003"}
    # Held-out data as before, so the resumed state still knows a best step; later evaluations are left out.
    done = place.train("was-best", "evaluate.every=0", "checkpoint.keep=1", "checkpoint.keep_best=false", ranks=1)
    assert done[0].returncode == 0, _said(done)
    assert {path.name for path in checkpoints.glob("step-*")} == {"step-00000003", "step-00000006"}, "resumed from 3"
    assert not (checkpoints / "best.json").exists()
    answer = place.verb("generate", "--model", str(place.folder / "was-best"), "--prompt", "x", "--max-new-tokens", "1")
    assert answer.returncode == 0 and "is gone" not in answer.stderr, answer.stderr


def test_generate_gives_the_context_of_training(place: Place, tmp_path: Path) -> None:
    """Variables of the template and its date, as the run file had them; the oracle writes the text out."""
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ '<|im_start|>system\\n' + strftime_now('%d %B %Y') + mood + '<|im_end|>\\n' }}"
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    options = [f"data.chat_template={template}", "data.template_kwargs={mood: joke}", "data.date=1999-12-31"]
    done = place.train("variables", *options, "schedule.max_steps=1", "evaluate.every=0", ranks=1)
    assert done[0].returncode == 0, _said(done)
    template.unlink()  # the checkpoint has it
    run = str(place.folder / "variables")
    answer = place.verb("generate", "--model", run, "--prompt", "weather", "--max-new-tokens", "24")
    exported = place.verb("export", run, "--output", str(tmp_path / "m"))
    assert (answer.returncode, exported.returncode) == (0, 0), answer.stderr + exported.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")

    def greedy(system: str) -> str:
        text = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nweather<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt")
        output = model.generate(**ids, do_sample=False, max_new_tokens=24, pad_token_id=0)
        return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))

    assert answer.stdout == greedy("31 December 1999joke") + "\n"
    assert greedy("31 December 1999joke") != greedy("01 January 2025joke"), "this model tells contexts apart"


def test_export_in_another_precision_is_the_rounded_checkpoint(uninterrupted: Place, tmp_path: Path) -> None:
    place = uninterrupted
    for name, extra in (("exact", ()), ("rounded", ("--dtype", "bfloat16"))):
        done = place.verb("export", str(place.folder / "whole"), "--output", str(tmp_path / name), *extra)
        assert done.returncode == 0, done.stderr
    assert "rounding from float32 to bfloat16" in done.stderr
    exact, rounded = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("exact", "rounded"))
    assert rounded.dtype == torch.bfloat16
    for (_, first), (_, second) in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
        assert torch.equal(first.bfloat16(), second)


def test_generate_answers_alike_from_export_and_checkpoint(uninterrupted: Place, tmp_path: Path) -> None:
    place = uninterrupted
    assert place.verb("export", str(place.folder / "whole"), "--output", str(tmp_path / "m")).returncode == 0
    common = ("--prompt", "the weather", "--max-new-tokens", "8")
    answers = [place.verb("generate", "--model", str(m), *common) for m in (tmp_path / "m", place.folder / "whole")]
    assert [answer.returncode for answer in answers] == [0, 0], answers[0].stderr
    assert answers[0].stdout == answers[1].stdout


def test_a_damaged_checkpoint_is_not_used_and_that_is_said(uninterrupted: Place) -> None:
    place = uninterrupted
    shutil.copytree(place.folder / "whole", place.folder / "damaged")
    shard = next((place.folder / "damaged" / "checkpoints" / "step-00000006" / "shards").glob("*rank_1*optim*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = place.train("damaged")
    assert [process.returncode for process in done] == [0, 0], _said(done)
    assert "is damaged" in done[0].stdout and "resumed from" in _said(done)
    assert [entry["loss"] for entry in place.steps("damaged")] == [entry["loss"] for entry in place.steps("whole")]
    expected, found = place.state("whole", 6), place.state("damaged", 6)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_killed_while_a_checkpoint_is_written_in_the_background(
    uninterrupted: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two files of a rank, in its thread, while training has gone on: only whole checkpoints are left."""
    place = uninterrupted
    every = ("checkpoint.every=1", "checkpoint.asynchronous=true")
    monkeypatch.setenv("SFT_DIST_FAULTS", "save.after_shard:rank=1:step=3:SIGKILL")
    killed = place.train("killed", *every)
    assert killed[1].returncode == -9 and killed[0].returncode not in (0, -9), _said(killed)
    monkeypatch.delenv("SFT_DIST_FAULTS")
    done = place.train("killed", *every)
    assert [process.returncode for process in done] == [0, 0], _said(done)
    assert "2 of 6 steps are done" in done[0].stdout
    assert [entry["loss"] for entry in place.steps("killed")] == [entry["loss"] for entry in place.steps("whole")]
    for step in (4, 6):
        expected, found = place.state("whole", step), place.state("killed", step)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def test_a_pickle_planted_in_a_published_checkpoint_does_not_run(place: Place) -> None:
    """With a manifest that matches it: whoever can write shards can write manifests."""
    done = place.train("planted", "checkpoint.stop_at_step=1", "evaluate.every=0", ranks=1)
    assert done[0].returncode == 75, _said(done)
    folder, marker = place.folder / "planted" / "checkpoints" / "step-00000001", place.folder / "marker"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        torch.save({"module": _Bomb(str(marker)), "optimizer_state_dict": _Bomb(str(marker))}, folder / name)
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(checkpoint.sealed(manifest)))
    resumed = place.train("planted", ranks=1)
    assert resumed[0].returncode == 74 and "not a readable checkpoint shard" in resumed[0].stdout, _said(resumed)
    exported = place.verb("export", str(place.folder / "planted"), "--output", str(place.folder / "planted-out"))
    assert exported.returncode == 74, exported.stderr
    assert not marker.exists() and not (place.folder / "planted-out").exists()


def test_init_from_takes_weights_only(uninterrupted: Place) -> None:
    place = uninterrupted
    done = place.train("from", f"model.init_from={place.folder / 'whole'}", "schedule.max_steps=1", ranks=1)
    assert done[0].returncode == 0, _said(done)
    summary = json.loads((place.folder / "whole" / "summary.json").read_text())
    started = json.loads((place.folder / "from" / "summary.json").read_text())
    assert started["heldout_nll_before"] == pytest.approx(summary["heldout_nll_after"], abs=1e-5)
    assert started["steps"] == 1


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["optimizer.learning_rate=1e-3"], "optimizer.learning_rate: 0.005 in the checkpoint, 0.001 now"),
        (["seed=4", "data.max_length=300"], "seed: 3 in the checkpoint, 4 now"),
        (["checkpoint.resume=never"], "holds checkpoints"),
    ],
)
def test_resuming_something_else_is_refused_by_name(uninterrupted: Place, overrides: list[str], named: str) -> None:
    done = uninterrupted.train("whole", *overrides)
    assert {process.returncode for process in done} == {78}, _said(done)
    assert named in done[0].stdout and "Traceback" not in _said(done)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(place: Place) -> None:
    arguments = ["-m", "sft_dist", "train", str(place.run_file), f"run_dir={place.folder / 'signal'}"]
    long = ["schedule.max_steps=100000", "schedule.epochs=100000", "evaluate.every=0"]
    ranks = start_ranks(2, [*arguments, *long])
    try:
        _wait_for_steps(place.folder / "signal" / "metrics.jsonl", ranks)
        # While one run holds the folder, a second one is refused.
        second = place.train("signal", ranks=1)
        assert second[0].returncode == 69 and "in use by another run" in second[0].stdout
        os.kill(ranks[1].pid, signal.SIGTERM)
        output = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [75, 75], output[0]
    outcome = place.outcome("signal")
    assert outcome["reason"] == "stopped by SIGTERM"
    assert outcome["checkpoint"].endswith(f"step-{outcome['step']:08d}")


@pytest.mark.parametrize("seen", ["run.lock.json", "config.json"])
def test_signals_before_the_first_step_leave_an_outcome(place: Place, seen: str) -> None:
    """As the folder is taken and as the model is loaded; the first one is told, whatever threads libraries have."""
    run_dir = place.folder / f"early-{seen}"
    run = subprocess.Popen(
        [sys.executable, "-m", "sft_dist", "train", str(place.run_file), f"run_dir={run_dir}"],
        env=rank_environment(0, 1, free_port()) | {"OMP_NUM_THREADS": "2"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (run_dir / seen).exists() and time.monotonic() < deadline:
        pass  # no sleep: the signal is to come while the folder is being taken
    run.send_signal(signal.SIGUSR1)
    time.sleep(0.002)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGUSR1, said
    assert "stopped by SIGUSR1" in said and "Traceback" not in said
    outcome = place.outcome(run_dir.name)
    assert outcome["exit_code"] == run.returncode and "SIGUSR1" in outcome["reason"]
    assert not (run_dir / "run.lock.json").exists()


def test_a_folder_that_cannot_be_used_does_not_keep_the_outcome_of_an_earlier_run(place: Place) -> None:
    run_dir = place.folder / "checkpoints-no-folder"
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("no folder")
    (run_dir / "outcome.json").write_text('{"exit_code": 75}')
    refused = place.train("checkpoints-no-folder", ranks=1)
    assert refused[0].returncode == 74 and "Traceback" not in refused[0].stdout
    outcome = place.outcome("checkpoints-no-folder")
    assert outcome["exit_code"] == 74 and "checkpoints" in outcome["reason"]
    assert not (run_dir / "run.lock.json").exists()


def test_a_signal_ends_the_wait_for_another_holder(place: Place) -> None:
    run_dir = place.folder / "held-by-another-host"
    run_dir.mkdir()
    note = json.dumps(asdict(Holder("elsewhere", 1, "another boot", "another namespace", 1)))
    (run_dir / "run.lock.json").write_text(note)
    run = subprocess.Popen(
        [sys.executable, "-m", "sft_dist", "train", str(place.run_file), f"run_dir={run_dir}"],
        env=rank_environment(0, 1, free_port()),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert run.stderr is not None
        line = next(line for line in run.stderr if "run_dir:" in line)
        run.send_signal(signal.SIGTERM)
        said = run.communicate(timeout=50)[1]  # it would listen for 60 s
    finally:
        run.kill()
    assert "listening" in line and run.returncode == 128 + signal.SIGTERM, said
    assert (run_dir / "run.lock.json").read_text() == note and not (run_dir / "outcome.json").exists()


def test_a_closed_terminal_costs_no_checkpoint(place: Place) -> None:
    """Ctrl-C in `sft-dist train ... | tee log` ends tee as well."""
    run_dir = place.folder / "closed"
    long = ["schedule.max_steps=100000", "schedule.epochs=100000", "evaluate.every=0", f"run_dir={run_dir}"]
    run = subprocess.Popen(
        [sys.executable, "-m", "sft_dist", "train", str(place.run_file), *long],
        env=rank_environment(0, 1, free_port()),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        _wait_for_steps(run_dir / "metrics.jsonl", [run])
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        run.stderr.close()
        run.send_signal(signal.SIGINT)
        assert run.wait(timeout=60) == 75
    finally:
        run.kill()
    assert place.outcome("closed")["reason"] == "stopped by SIGINT"


def test_other_heldout_data_starts_the_search_for_the_best_anew(uninterrupted: Place) -> None:
    place = uninterrupted
    shutil.copytree(place.folder / "whole", place.folder / "other-heldout")
    other = write_jsonl(place.folder / "heldout2.jsonl", make_records(5, seed=9, max_words=6))
    done = place.train("other-heldout", f"data.heldout={other}")
    assert [process.returncode for process in done] == [0, 0], _said(done)
    assert "the best checkpoint so far is forgotten" in done[0].stdout
    assert not (place.folder / "other-heldout" / "checkpoints" / "best.json").exists()


def _said(ranks: list[subprocess.CompletedProcess[str]]) -> str:
    return "\n".join(
        f"--- rank {n}, exit code {rank.returncode}\n{rank.stdout[-3000:]}" for n, rank in enumerate(ranks)
    )


def _wait_for_steps(path: Path, ranks: list[Any]) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and all(rank.poll() is None for rank in ranks):
        if path.exists() and path.read_text().count('"train"') >= 3:
            return
        time.sleep(0.1)
    raise AssertionError("the run did not get to its third step")


def test_broken_numbers_end_the_run_with_70_and_the_reason(place: Place) -> None:
    done = place.train("broken", "optimizer.learning_rate=1e30", "schedule.warmup_fraction=0", "checkpoint.every=1")
    assert {process.returncode for process in done} == {70}, _said(done)
    assert "TrainingError: step" in done[0].stdout and "Traceback" not in _said(done)
    assert place.outcome("broken")["exit_code"] == 70
