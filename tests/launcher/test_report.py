"""Which code a launch ends with, and what is read from logs, /proc and outcome.json on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.processes import parse_stat
from launcher.report import judge, tail
from launcher.rundir import Outcome, outcome_mark, read_outcome
from launcher.supervise import Ended, Ending, Log


def failed(code: int) -> Ending:
    return Ending(code, Ended("srun", code, f"exit status {code}", log=None))


@pytest.mark.parametrize(
    ("ending", "outcome", "code"),
    [
        (failed(1), Outcome(75, "stopped by SIGTERM"), 75),
        (failed(137), Outcome(70, "loss is not finite"), 70),
        (failed(137), None, 137),
        (Ending(0), None, 0),
        (Ending(0, num_left_behind=2), Outcome(75, "stopped by SIGUSR1"), 75),
        (Ending(130, at_once=True), Outcome(75, "stopped by SIGINT"), 130),
    ],
)
def test_an_outcome_comes_first_and_the_code_second(ending: Ending, outcome: Outcome | None, code: int) -> None:
    assert judge(ending, outcome=outcome).code == code


def test_processes_that_survive_sigkill_are_named() -> None:
    verdict = judge(Ending(0, immortal=(12, 13)), outcome=None)
    assert "12, 13" in verdict.lines[0]


def test_the_tail_holds_the_last_lines_of_this_launch_only(tmp_path: Path) -> None:
    path = tmp_path / "rank-1.log"
    path.write_bytes(b"an earlier launch\n")
    log = Log(path, start=path.stat().st_size)
    assert tail(log) == []
    with path.open("ab") as file:
        file.write("".join(f"line {i}\n" for i in range(30)).encode() + b"1%\r50%\r100%\r\n\xff tail")
    assert tail(log, num_lines=3) == ["line 29", "100%", "\ufffd tail"]
    assert tail(log)[0] == "line 12"


def test_an_outcome_counts_only_when_it_was_written_since(tmp_path: Path) -> None:
    path = tmp_path / "outcome.json"
    assert read_outcome(tmp_path, mark_before=outcome_mark(tmp_path)) is None
    path.write_text(json.dumps({"exit_code": 0, "reason": "done", "step": 9}))
    assert read_outcome(tmp_path, mark_before=None) == Outcome(0, "done")
    mark = outcome_mark(tmp_path)
    assert read_outcome(tmp_path, mark_before=mark) is None
    path.with_suffix(".tmp").write_text(json.dumps({"exit_code": 75, "reason": "stopped", "step": 9}))
    path.with_suffix(".tmp").replace(path)
    assert read_outcome(tmp_path, mark_before=mark) == Outcome(75, "stopped")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"exit_code": "soon"}'])
def test_a_broken_outcome_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "outcome.json").write_text(content)
    assert read_outcome(tmp_path, mark_before=None) is None


def test_a_process_name_with_blanks_and_brackets_is_read() -> None:
    process = parse_stat("77 (a) R (b c) S 5 66 55 0 -1 4194560")
    assert (process.pid, process.state, process.parent, process.session) == (77, "S", 5, 55)
