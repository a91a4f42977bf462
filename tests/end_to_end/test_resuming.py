"""Through the command line: other numbers of ranks, rewinds, and ends that come twice."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import Place, make_place
from tests.helpers import oracle
from tests.helpers.models import build_model
from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place whose model draws nothing, with a whole run on two ranks that saved every second of its six steps."""
    place = make_place(
        tmp_path_factory.mktemp("still"),
        batch={"global_packs": 5},
        schedule={"epochs": 4, "max_steps": 6},
        checkpoint={"every": 2, "keep": 100},
    )
    shutil.rmtree(place.folder / "model")
    build_model(place.folder / "model", "llama")
    done = place.train("whole")
    assert [process.returncode for process in done] == [0, 0], done[0].stdout
    return place


def entries(place: Place, run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place.folder / run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_goes_on_with_fewer_ranks_and_with_more(still: Place, tmp_path: Path) -> None:
    """From step 2 of a run that went further: 2 ranks, then 1, then 3; 5 packs a step divide over none of them."""
    place = still
    shutil.copytree(place.folder / "whole", place.folder / "elastic")
    for step in (4, 6):
        shutil.rmtree(place.folder / "elastic" / "checkpoints" / f"step-{step:08d}")
    one = place.train("elastic", "checkpoint.stop_at_step=4", ranks=1)
    assert one[0].returncode == 75, one[0].stdout
    assert "note: written by 2 ranks, going on with 1" in one[0].stdout
    three = place.train("elastic", ranks=3)
    assert [process.returncode for process in three] == [0, 0, 0], three[0].stdout
    assert "written by 1 ranks, going on with 3" in three[0].stdout and "4 of 6 steps are done" in three[0].stdout

    losses = {entry["step"]: entry["loss"] for entry in place.steps("whole")}
    assert {entry["step"]: entry["loss"] for entry in place.steps("elastic")} == pytest.approx(losses, abs=1e-6, rel=0)
    for kind, key in (("train", "num_target_tokens"), ("heldout", "nll")):
        before, after = (
            {entry["step"]: entry[key] for entry in entries(place, run) if entry["kind"] == kind}
            for run in ("whole", "elastic")
        )
        assert after == pytest.approx(before, abs=1e-5)
    manifest = json.loads((place.folder / "elastic" / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert manifest["world_size"] == 3

    # What three ranks wrote, every other verb reads.
    run, out = str(place.folder / "elastic"), tmp_path / "export"
    exported = place.verb("export", run, "--output", str(out))
    assert exported.returncode == 0, exported.stderr
    answers = [
        place.verb("generate", "--model", m, "--prompt", "joke", "--max-new-tokens", "6") for m in (run, str(out))
    ]
    assert answers[0].returncode == 0 and answers[0].stdout == answers[1].stdout, answers[0].stderr
    scored = run_ranks(
        2, ["-m", "sft_dist", "score", str(place.run_file), "--model", run, "--output", str(tmp_path / "s")]
    )
    assert [process.returncode for process in scored] == [0, 0], scored[0].stdout
    model, tokenizer = oracle.load(out)
    records = [json.loads(line) for line in (place.folder / "heldout.jsonl").read_text().splitlines()]
    for record, line in zip(records, map(json.loads, (tmp_path / "s").read_text().splitlines()), strict=True):
        expected = sum(value for _, value in oracle.turn_logprobs(model, tokenizer, record["messages"]))
        assert line["logprob"] == pytest.approx(expected, abs=1e-3, rel=1e-5)


def test_metrics_of_a_rewound_run_are_those_of_one_run(still: Place) -> None:
    """Back to step 2, while the log holds six steps, and its last line was cut short by the crash."""
    place = still
    shutil.copytree(place.folder / "whole", place.folder / "rewound")
    for step in (4, 6):
        (place.folder / "rewound" / "checkpoints" / f"step-{step:08d}" / "manifest.json").unlink()
    with open(place.folder / "rewound" / "metrics.jsonl", "a") as log:
        log.write('{"kind": "train", "step": 7, "lo')
    done = place.train("rewound")
    assert [process.returncode for process in done] == [0, 0], done[0].stdout
    whole, rewound = ([(entry["kind"], entry["step"]) for entry in entries(place, run)] for run in ("whole", "rewound"))
    assert len(set(rewound)) == len(rewound)
    assert sorted(rewound) == sorted(whole)
    assert [entry["loss"] for entry in place.steps("rewound")] == [entry["loss"] for entry in place.steps("whole")]


def test_a_run_that_dies_at_its_end_ends_the_same_once_more(still: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after the last checkpoint has its name: evaluation, best checkpoint and summary come out as ever."""
    place = still
    three = ["schedule.max_steps=3", "evaluate.every=1"]
    undisturbed = place.train("three", *three, ranks=1)
    assert undisturbed[0].returncode == 0, undisturbed[0].stdout
    for point in ("save.before_publish", "save.after_publish"):
        monkeypatch.setenv("SFT_DIST_FAULTS", f"{point}:step=3:SIGKILL")
        killed = place.train("twice", *three, ranks=1)
        assert killed[0].returncode == -9, killed[0].stdout
        assert not (place.folder / "twice" / "outcome.json").exists()
    monkeypatch.delenv("SFT_DIST_FAULTS")
    done = place.train("twice", *three, ranks=1)
    assert done[0].returncode == 0 and "3 of 3 steps are done" in done[0].stdout, done[0].stdout
    assert place.outcome("twice")["step"] == 3
    summaries = [json.loads((place.folder / run / "summary.json").read_text()) for run in ("three", "twice")]
    same = ("steps", "trained_tokens", "first_loss", "last_loss", "heldout_nll_before", "heldout_nll_best")
    for key in (*same, "heldout_nll_after"):
        assert summaries[0][key] == summaries[1][key], key
    first, second = (
        # Of a checkpoint it is told once it is published, which is where the run was killed.
        [(e["kind"], e["step"]) for e in entries(place, run) if e["kind"] not in ("train_time", "checkpoint")]
        for run in ("three", "twice")
    )
    assert sorted(first) == sorted(second)
    best = [json.loads((place.folder / run / "checkpoints" / "best.json").read_text()) for run in ("three", "twice")]
    assert best[0] == best[1]


def test_an_allowed_change_takes_effect(still: Place) -> None:
    """The run file's values, not those that lie in the checkpoint's optimizer."""
    place = still
    shutil.copytree(place.folder / "whole", place.folder / "allowed")
    for step in (4, 6):
        shutil.rmtree(place.folder / "allowed" / "checkpoints" / f"step-{step:08d}")
    changed = ["optimizer.weight_decay=90.0", "checkpoint.allow_changed=[optimizer.weight_decay]"]
    done = place.train("allowed", *changed, "checkpoint.stop_at_step=4", "evaluate.every=0", ranks=1)
    assert done[0].returncode == 75, done[0].stdout
    losses = [[entry["loss"] for entry in place.steps(run)] for run in ("whole", "allowed")]
    assert losses[1][:3] == pytest.approx(losses[0][:3], abs=1e-6), "step 3 begins with the weights of the checkpoint"
    assert abs(losses[1][3] - losses[0][3]) > 1e-3, "and decays them as the run file now says"
