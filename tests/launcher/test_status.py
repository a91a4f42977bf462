"""What `sft-launch status` tells from files, whole, cut short or missing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.__main__ import main
from launcher.job import LaunchError
from launcher.status import Status, lines, productive_and_wall_s, read_status

NOW_S = 2_000_000_000.0


def make_run(folder: Path, *, steps: int = 40, silent_s: float = 5.0) -> Path:
    metrics = [
        {"kind": "train", "step": s, "num_steps": 100, "loss": 3 - s / 100, "num_tokens": 600, "step_time_s": 2.0}
        for s in range(1, steps + 1)
    ]
    heldout = {"kind": "heldout", "step": 40, "nll": 1.25}
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in [*metrics, heldout]))
    touch(folder / "metrics.jsonl", silent_s)
    return folder


def add_checkpoint(run_dir: Path, name: str, *, age_s: float | None) -> None:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    if age_s is not None:
        (folder / "manifest.json").write_text("{}")
        touch(folder / "manifest.json", age_s)


def touch(path: Path, age_s: float) -> None:
    os.utime(path, (NOW_S - age_s, NOW_S - age_s))


def test_a_run_at_work(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    add_checkpoint(run_dir, "step-00000020", age_s=100)
    add_checkpoint(run_dir, "step-00000040", age_s=7)
    add_checkpoint(run_dir, "step-00000060", age_s=None)  # not whole
    add_checkpoint(run_dir, ".tmp-step-00000080", age_s=1)
    status = read_status(run_dir, now_s=NOW_S)
    assert list(lines(status)) == [
        f"{run_dir}: at work: its last word is 5s old",
        "step        40 of 100 (40%)",
        "loss        2.6000, held-out NLL 1.2500",
        "rate        300 tokens/s, 2.00 s a step",
        "eta         2m00s",
        f"checkpoint  step 40 ({run_dir}/checkpoints/step-00000040), 7s ago",
        "restarts    -",
        "goodput     - of -",
    ]


def test_a_silent_run_is_called_so_and_an_ended_one_says_how(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, silent_s=3700)
    assert read_status(run_dir, now_s=NOW_S).state.startswith("silent: its last word is 1h01m old; killed, or")
    (run_dir / "outcome.json").write_text('{"exit_code": 75, "reason": "stopped by SIGUSR1"}')
    assert read_status(run_dir, now_s=NOW_S).state == "ended: stopped by SIGUSR1 (exit code 75)"


def test_what_is_missing_or_damaged_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="not a run folder"):
        read_status(tmp_path, now_s=NOW_S)
    (tmp_path / "outcome.json").write_text('{"exit_c')
    (tmp_path / "metrics.jsonl").write_bytes(b'\xff\n[1]\n{"kind": "train", "step": 3, "loss": null}\n{"kind": "tr')
    (tmp_path / "starts.jsonl").write_text('{"did": "start"}\nnonsense\n')
    status = read_status(tmp_path, now_s=NOW_S)
    assert (status.step, status.num_steps, status.loss, status.eta_s, status.goodput) == (3, None, None, None, None)
    assert len(list(lines(status))) == 8


def test_json_holds_every_fact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(make_run(tmp_path)), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.keys() == Status.__dataclass_fields__.keys() and told["step"] == 40 and told["goodput"] is None


def start(at: float, step: int, clock: str = "a", startup_s: float = 10.0) -> list[dict[str, Any]]:
    return [{"did": "start", "at": at, "clock": clock}, {"did": "startup", "at": at + startup_s, "step": step}]


def test_steps_that_are_taken_again_are_no_goodput(tmp_path: Path) -> None:
    # 10 s of start-up, steps 1 to 4 of 5 s, killed; 20 s later again from step 2, which is 10 s of new start-up.
    first = [*start(0, 0), *({"did": "step", "at": 10.0 + 5 * s, "step": s} for s in range(1, 5))]
    again = [*start(50, 2), *({"did": "step", "at": 50.0 + 5 * s, "step": s} for s in range(3, 6))]
    assert productive_and_wall_s([*first, *again]) == (2 * 5 + 3 * 5, 75)
    run_dir = make_run(tmp_path)
    (run_dir / "starts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in [*first, *again]))
    status = read_status(run_dir, now_s=NOW_S)
    assert (status.num_restarts, status.wall_s) == (1, 75) and status.goodput == pytest.approx(25 / 75)


def test_clocks_of_two_machines_are_not_compared() -> None:
    productive_s, wall_s = productive_and_wall_s(
        [*start(0, 0), *start(1e9, 0, clock="b"), *start(1e9 + 60, 0, clock="b")]
    )
    assert (productive_s, wall_s) == (0, 10 + 10 + 60)


@given(st.lists(st.tuples(st.sampled_from(["start", "startup", "step", "checkpoint", "end"]), st.integers(0, 9))))
def test_productive_time_is_never_more_than_all_time(marks: list[tuple[str, int]]) -> None:
    entries = [{"did": did, "at": float(i), "step": step, "clock": "a"} for i, (did, step) in enumerate(marks)]
    productive_s, wall_s = productive_and_wall_s(entries)
    assert 0 <= productive_s <= wall_s <= max(0, len(marks) - 1)
