"""Numbers that break on two real ranks: named, never trained on, left out or rolled back without a trace in the state.

Two conversations of the data are poison to the model: a character that only one of them has is embedded so that its
loss is finite and its gradient is not ("Z"), and one so that the loss of its step spikes ("J").
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist import faults
from sft_dist.config import load_config
from sft_dist.preparation import training_set
from sft_dist.train import checkpoint
from tests.end_to_end.conftest import Place, make_place
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import build_model

pytestmark = pytest.mark.slow

STEPS = 8
SPIKE_AT, LAST_REGULAR = 6, 3  # steps, from 1
EVERY_STEP = ["checkpoint.every=1", "evaluate.every=0"]
ROLLBACK = ["numbers.spike=rollback", "numbers.spike_window=4", "numbers.spike_threshold=5"]
ROLLBACK += ["checkpoint.every=3", "checkpoint.keep=1"]


@dataclass(frozen=True)
class Poisoned:
    place: Place
    seed: int  # of the order in which the spike comes at SPIKE_AT

    def train(self, run: str, *overrides: str, data: str = "train") -> list[CompletedProcess[str]]:
        paths = [f"data.train={self.place.folder / data}.jsonl", f"seed={self.seed}", "evaluate.every=0"]
        return self.place.train(run, *paths, *overrides)

    def same_state(self, run: str, other: str, step: int, other_step: int | None = None) -> bool:
        """Whether weights, moments and Adam's steps are the same, bit by bit, on every rank."""
        first, second = self.place.state(run, step), self.place.state(other, other_step or step)
        assert first.keys() == second.keys() and len(first) > 6
        return all(torch.equal(value, second[name]) for name, value in first.items())

    def saved(self, run: str, step: int) -> checkpoint.TrainState:
        folder = self.place.folder / run / "checkpoints" / f"step-{step:08d}"
        assert checkpoint.fault_of(folder, None) is None
        return checkpoint.read(folder).state

    def entries(self, run: str, kind: str) -> list[dict[str, Any]]:
        lines = (self.place.folder / run / "metrics.jsonl").read_text().splitlines()
        return [entry for line in lines if (entry := json.loads(line))["kind"] == kind]

    def json(self, run: str, name: str) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads((self.place.folder / run / name).read_text())
        return tree


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Poisoned:
    place = make_place(tmp_path_factory.mktemp("numbers"), schedule={"epochs": 1, "max_steps": STEPS})
    folder = place.folder
    records = make_records(120, seed=5, max_words=6)
    write_jsonl(folder / "train.jsonl", records)
    for name, character in (("broken", "Z"), ("spiky", "J")):
        messages = [{"role": "user", "content": "say"}, {"role": "assistant", "content": f"rain {character} " * 12}]
        poison = {"id": f"the {name} one", "messages": messages}
        write_jsonl(folder / f"{name}.jsonl", [*records[:40], poison, *records[40:]])
    _poison_the_model(build_model(folder / "model", "qwen2", dropout=0.1))
    seed = next(seed for seed in range(1000) if _step_of(place, "spiky", "the spiky one", seed) == SPIKE_AT)
    return Poisoned(place, seed)


@pytest.fixture(autouse=True)
def _no_faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    yield


@pytest.fixture(scope="module")
def whole(poisoned: Poisoned) -> Poisoned:
    _expect(poisoned.train("whole", *EVERY_STEP), 0, 0)
    return poisoned


def _poison_the_model(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    broken, spiky, likely = tokenizer.convert_tokens_to_ids(["Z", "J", "X"])
    with torch.no_grad():
        # Its square overflows in the norms: 1/inf gives hidden states of 0 forward, and 0 * inf backward.
        model.get_input_embeddings().weight[broken] = 3e38
        model.get_input_embeddings().weight[spiky] = 1e4
        model.get_output_embeddings().weight[likely] += 4.0
    model.save_pretrained(folder)


def _step_of(place: Place, data: str, conversation: str, seed: int) -> int:
    """The step, from 1, that has a conversation."""
    selection, plan = training_set(
        load_config(place.run_file, [f"data.train={place.folder / data}.jsonl", f"seed={seed}"])
    )
    for step in range(plan.num_steps):
        for pack in plan.packs(step):
            if any(selection[index].sample.conversation_id == conversation for index in pack):
                return step + 1
    return 0


def _expect(done: list[CompletedProcess[str]], *codes: int) -> None:
    said = "\n".join(f"--- rank {n}, {rank.returncode}\n{rank.stdout[-4000:]}" for n, rank in enumerate(done))
    assert tuple(rank.returncode for rank in done) == codes, said
    assert "Traceback" not in said, said


def test_a_gradient_that_breaks_with_a_finite_loss_names_the_one_conversation(poisoned: Poisoned) -> None:
    step = _step_of(poisoned.place, "broken", "the broken one", poisoned.seed)
    done = poisoned.train("broken", *EVERY_STEP, data="broken")
    _expect(done, 70, 70)
    said = next(line for line in done[0].stdout.splitlines() if line.startswith("TrainingError"))
    assert f"step {step}: the gradient norm is inf, the loss " in said and "so it was not taken" in said
    assert "the broken one (" in said and "broken.jsonl:41) of broken" in said
    report = poisoned.json("broken", f"non_finite/step-{step:08d}.json")
    (offender,) = report["offenders"]
    assert offender["id"] == "the broken one" and offender["is_alone"]
    assert f"rank {offender['rank']}, micro-batch {offender['micro_batch']}: the broken one" in said
    assert report["broken_weights"] == report["broken_losses"] == []
    if step > 1:
        assert poisoned.saved("broken", step - 1).step == step - 1


def test_a_loss_that_breaks_on_one_rank_stops_before_the_step(whole: Poisoned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, "step.loss:rank=1:step=3:nan")
    done = whole.train("stopped", *EVERY_STEP)
    _expect(done, 70, 70)
    said = next(line for line in done[0].stdout.splitlines() if line.startswith("TrainingError"))
    assert "step 3: the loss is nan" in said and "rank 1" in said and "rank 0" not in said
    assert "the last checkpoint is step 2" in said and "train.jsonl:" in said
    report = whole.json("stopped", "non_finite/step-00000003.json")
    assert {rank for rank, _ in report["broken_losses"]} == {1}
    assert {offender["rank"] for offender in report["offenders"]} == {1}
    assert len(report["offenders"]) > 1, "all conversations of the rank, as planted"
    assert whole.saved("stopped", 2).step == 2
    assert whole.same_state("stopped", "whole", 2)
    outcome = whole.place.outcome("stopped")
    assert outcome["exit_code"] == 70 and "step 3: the loss is nan" in outcome["reason"]


def test_skipped_steps_leave_no_trace_in_the_state_and_are_counted_through_a_resume(
    whole: Poisoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both kinds of breakage; a new process goes on from behind the first with clean buffers: the oracle."""
    monkeypatch.setenv(faults.VARIABLE, "step.gradient:rank=1:step=3:nan,step.loss:rank=0:step=5:nan")
    skip = [*EVERY_STEP, "numbers.non_finite=skip", "numbers.max_skipped=2"]
    done = whole.train("skipping", *skip)
    _expect(done, 0, 0)
    assert whole.same_state("skipping", "whole", 2)
    assert whole.same_state("skipping", "skipping", 2, 3) and whole.same_state("skipping", "skipping", 4, 5)
    assert not whole.same_state("skipping", "skipping", 3, 4)
    assert not whole.same_state("skipping", "whole", STEPS)

    start = f"checkpoint.resume={whole.place.folder / 'skipping' / 'checkpoints' / 'step-00000003'}"
    _expect(whole.train("skipping-resumed", *skip, start), 0, 0)
    for step in (4, 5, 6, STEPS):
        assert whole.same_state("skipping-resumed", "skipping", step)
    for run in ("skipping", "skipping-resumed"):
        assert whole.saved(run, STEPS).history == whole.saved("skipping", STEPS).history
        assert whole.saved(run, STEPS).history.skipped == (3, 5)
        summary = whole.json(run, "summary.json")
        assert summary["skipped_steps"] == summary["untrained_steps"] == [3, 5] and summary["steps"] == STEPS
    assert [entry["step"] for entry in whole.entries("skipping", "skipped")] == [3, 5]
    assert all(entry["conversations"] for entry in whole.entries("skipping", "skipped"))
    trained = {entry["step"]: entry for entry in whole.entries("skipping", "train")}
    assert sorted(trained) == [1, 2, 4, 6, 7, 8]
    rates = {entry["step"]: entry["learning_rate"] for entry in whole.entries("whole", "train")}
    assert all(entry["learning_rate"] == rates[step] for step, entry in trained.items()), "goes on by the step number"
    tokens = sum(entry["num_tokens"] for entry in trained.values())
    assert whole.saved("skipping", STEPS).num_tokens == tokens, "what was not trained on is not counted"
    assert "warning: step 3: the gradient norm is inf" in done[0].stdout and "1 of 2 steps" in done[0].stdout

    # The one that was left out before the stop counts: with one allowed, the next ends the run.
    _expect(whole.train("skipping-once", *skip[:-1], "numbers.max_skipped=1", start), 70, 70)
    assert "has left out 1 step(s), numbers.max_skipped" in whole.place.outcome("skipping-once")["reason"]
    assert whole.saved("skipping-once", 4).step == 4


def test_a_rollback_equals_a_run_that_never_had_these_steps_however_it_is_interrupted(
    poisoned: Poisoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = poisoned.train("back", *ROLLBACK, data="spiky")
    _expect(done, 0, 0)
    assert f"loss spike at step {SPIKE_AT}" in done[0].stdout
    assert f"back to the weights of step {LAST_REGULAR}" in done[0].stdout
    for overrides, code in ([["checkpoint.stop_at_step=5"], 75], [["checkpoint.stop_at_step=7"], 75], [[], 0]):
        _expect(poisoned.train("back-stopped", *ROLLBACK, *overrides, data="spiky"), code, code)
    steps = range(LAST_REGULAR + 1, SPIKE_AT + 1)
    monkeypatch.setenv(faults.VARIABLE, ",".join(f"step.loss:step={step}:nan" for step in steps))
    _expect(poisoned.train("without", "numbers.non_finite=skip", data="spiky"), 0, 0)

    assert poisoned.same_state("back", "without", STEPS)
    assert poisoned.same_state("back-stopped", "back", STEPS)
    history = poisoned.saved("back", STEPS).history
    assert history == poisoned.saved("back-stopped", STEPS).history
    assert history.rollbacks == ((LAST_REGULAR + 1, SPIKE_AT),) and history.num_alarms == 1
    assert poisoned.saved("back", STEPS).num_tokens == poisoned.saved("without", STEPS).num_tokens
    for run in ("back", "back-stopped"):
        summary = poisoned.json(run, "summary.json")
        assert summary["rollbacks"] == [[LAST_REGULAR + 1, SPIKE_AT]] and summary["untrained_steps"] == list(steps)
        (entry,) = poisoned.entries(run, "rollback")
        assert (entry["step"], entry["to"], entry["first"], entry["last"]) == (SPIKE_AT, LAST_REGULAR, 4, SPIKE_AT)
        (spike,) = poisoned.entries(run, "spike")
        assert spike["z"] > 5
    losses = [entry["loss"] for entry in poisoned.entries("back", "train")]
    assert losses == [entry["loss"] for entry in poisoned.entries("back-stopped", "train")]


def test_a_rank_without_memory_says_what_did_not_fit_and_the_others_do_not_hang(
    poisoned: Poisoned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(faults.VARIABLE, "step.before_backward:rank=1:step=2:memory")
    # One that is written in the background may not be published yet, and no collective waits for it.
    done = poisoned.train("memory", *EVERY_STEP, "checkpoint.asynchronous=false")
    assert done[1].returncode == 70 and done[0].returncode not in (0, 1), done[0].stdout
    said = next(line for line in done[1].stdout.splitlines() if "TrainingError" in line)
    assert "step 2, micro-batch 1: out of memory on rank 1, in a forward of " in said
    assert "targets; the longest, c" in said and "GiB" in said and "data.max_length" in said
    assert poisoned.saved("memory", 1).step == 1
