"""Where the time of a run went, from the lines its starts left: sums, lost steps, recoveries, torn files."""

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.train import goodput


def lines(*entries: tuple[Any, ...]) -> list[dict[str, Any]]:
    """(at, did, step or exit code or clock) as the file has them."""
    names = {"start": "clock", "end": "exit_code"}
    return [{"at": at, "did": did, names.get(did, "step"): value} for at, did, value in entries]


def test_a_run_that_was_killed_and_goes_on() -> None:
    """Counted by hand: killed in step 4 after a checkpoint of step 2, started again 5 s later."""
    times = goodput.account(
        lines(
            *[(100, "start", "a"), (110, "startup", 0), (111, "evaluate", 0), (113, "step", 1), (115, "step", 2)],
            *[(116, "checkpoint", 2), (118, "step", 3)],
            *[(123, "start", "a"), (131, "startup", 2), (134, "step", 3), (136, "step", 4), (137, "checkpoint", 4)],
            (139, "end", 0),
        )
    )
    assert (times.num_starts, times.wall_s) == (2, 39)
    assert times.productive_s == (113 - 111) + (115 - 113) + (134 - 131) + (136 - 134)
    assert (times.redone_s, times.startup_s, times.down_s) == (118 - 116, 10 + 8, 5)
    assert (times.checkpoint_s, times.evaluate_s, times.other_s, times.waiting_s) == (2, 1, 2, 0)
    assert times.goodput == 9 / 39
    # Step 3 had been there before; step 4 is the first new one.
    assert times.recoveries_s == (136 - 118,)
    said = list(times.lines())
    assert "goodput 23.1%: 9s of steps in 39s since the first of 2 start(s)" in said[0]
    assert "redone steps 5.1%" in said[0] and "waiting" not in said[0]
    assert "recovered 1 time(s)" in said[1] and "18.0 s (median)" in said[1]


def test_a_stop_on_request_is_waiting_and_no_failure() -> None:
    first = [(0, "start", "a"), (1, "startup", 0), (2, "step", 1), (3, "checkpoint", 1), (4, "end", 75)]
    times = goodput.account(lines(*first, (100, "start", "a"), (101, "startup", 1), (102, "step", 2), (103, "end", 0)))
    assert (times.waiting_s, times.down_s, times.redone_s, times.recoveries_s) == (96, 0, 0, ())


def test_several_failures_before_a_new_step_are_one_recovery() -> None:
    begun = [(0, "start", "a"), (1, "startup", 0), (2, "step", 1)]
    failed = [(5, "start", "a"), (6, "end", 69), (9, "start", "a"), (12, "startup", 0), (14, "step", 1)]
    times = goodput.account(lines(*begun, *failed, (15, "step", 2)))
    assert times.recoveries_s == (15 - 2,)
    assert times.down_s == (5 - 2) + (9 - 6)


def test_clocks_of_two_machines_are_not_compared() -> None:
    first = [(1000, "start", "a"), (1001, "startup", 0), (1002, "step", 1)]
    times = goodput.account(lines(*first, (50, "start", "b"), (52, "startup", 0), (55, "step", 1), (56, "step", 2)))
    assert (times.num_unknown, times.down_s, times.recoveries_s, times.wall_s) == (1, 0, (), 2 + 6)
    assert "two machines" in list(times.lines())[1]


def test_a_rollback_within_a_start_gives_the_steps_up() -> None:
    taken = [(1, "step", 1), (2, "step", 2), (4, "step", 3), (7, "step", 2), (11, "step", 3)]
    times = goodput.account(lines((0, "start", "a"), (0, "startup", 0), *taken))
    assert (times.productive_s, times.redone_s) == (1 + 3 + 4, 1 + 2)


@given(st.lists(st.tuples(st.sampled_from(["start", "startup", "step", "evaluate", "checkpoint", "end"]),
                          st.integers(0, 9), st.floats(0, 1e4)), max_size=40))  # fmt: skip
def test_whatever_the_lines_the_parts_are_the_whole(drawn: list[tuple[str, int, float]]) -> None:
    at = 1e6
    entries: list[dict[str, Any]] = lines((at, "start", "a"))
    for did, value, seconds in drawn:
        at += seconds
        entries.append({"did": did, "at": at, "step": value, "exit_code": value, "clock": "a"})
    times = goodput.account(entries)
    assert times.wall_s == pytest.approx(entries[-1]["at"] - entries[0]["at"])
    assert times.goodput is None or 0 <= times.goodput <= 1


def test_every_cut_of_the_file_can_be_read_and_written_on(tmp_path: Path) -> None:
    """A process may be killed inside any write."""
    goodput.begin(tmp_path)
    timeline = goodput.Timeline(tmp_path, is_main=True)
    timeline.mark("startup", step=0)
    timeline.mark("step", step=1)
    goodput.end(tmp_path, 75)
    path = tmp_path / goodput.STARTS
    whole = path.read_bytes()
    assert [entry["did"] for entry in goodput.read(tmp_path)] == ["start", "startup", "step", "end"]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        num_whole = len(goodput.read(tmp_path))
        assert whole[:size].count(b"\n") <= num_whole <= whole[:size].count(b"\n") + 1
        goodput.begin(tmp_path)
        assert len(goodput.read(tmp_path)) == num_whole + 1, "the torn line spoils no other"


def test_the_start_is_that_of_the_process_and_other_ranks_write_nothing(tmp_path: Path) -> None:
    goodput.Timeline(tmp_path, is_main=False).mark("step", step=1)
    assert not list(tmp_path.iterdir())
    goodput.begin(tmp_path)
    (start,) = goodput.read(tmp_path)
    assert start["at"] == pytest.approx(psutil.Process().create_time(), abs=1.1)
    assert start["at"] < time.time() - 0.1 and start["clock"]


def test_a_file_of_another_kind_is_no_error(tmp_path: Path) -> None:
    (tmp_path / goodput.STARTS).write_text('[]\n3\n{"did": "step"}\n{"at": "x", "did": "step"}\n\x00\n')
    assert goodput.read(tmp_path) == [] and goodput.account([]).goodput is None
    assert json.dumps(goodput.account([]).as_dict())
