"""Which code a launch ends with, and what is read from logs and /proc on the way."""

from __future__ import annotations

from pathlib import Path

from launcher.logs import Log, Quote, tail
from launcher.processes import parse_stat
from launcher.report import judge
from launcher.supervise import Ended, Ending


def test_the_code_is_that_of_the_ending_and_the_failure_is_quoted() -> None:
    failure = Ended("rank 1 on n2", 65, "exit status 65", Quote("n2:/logs/rank-1.log", ("no such file",)))
    verdict = judge(Ending(65, failure))
    assert verdict.code == 65
    assert verdict.lines == (
        "the last lines of rank 1 on n2 (n2:/logs/rank-1.log):",
        "| no such file",
        "rank 1 on n2 failed first: exit status 65 (exit code 65)",
    )


def test_processes_that_survive_sigkill_are_named() -> None:
    verdict = judge(Ending(0, immortal=(12, 13)))
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


def test_the_tail_of_a_log_that_has_gone_says_so(tmp_path: Path) -> None:
    assert tail(Log(tmp_path / "rank-1.log", start=3)) == ["log cannot be read: No such file or directory"]


def test_a_process_name_with_blanks_and_brackets_is_read() -> None:
    process = parse_stat("77 (a) R (b c) S 5 66 55 0 -1 4194560")
    assert (process.pid, process.state, process.parent, process.session) == (77, "S", 5, 55)
