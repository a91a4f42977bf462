"""Who is stuck or slow, by what the ranks say: pure values."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from sft_dist.distributed.beats import Beat, Heard, Process, Verdict, find_slow, find_stuck, first_beside, hang

TIMEOUT_S, SILENT_S = 60.0, 4.0


def beat(rank: int, **changes: object) -> Beat:
    process = Process(f"host{rank}", 100 + rank, "boot", 5)
    return replace(Beat(rank, process, 7, "forward", 3, 50, 80.0, True, 100, 90), **changes)


def stuck_ranks(heard: list[Heard], num_ranks: int | None = None) -> list[int]:
    found = find_stuck(heard, num_ranks or len(heard), timeout_s=TIMEOUT_S, silent_after_s=SILENT_S)
    return [one.rank for one in found]


@given(st.integers(1, 6), st.data())
def test_nobody_is_stuck_as_long_as_a_rank_that_speaks_moves(size: int, data: st.DataObject) -> None:
    mover = data.draw(st.integers(0, size - 1))
    idle = data.draw(st.lists(st.floats(0, 1e4), min_size=size, max_size=size))
    idle[mover] = data.draw(st.floats(0, TIMEOUT_S - 5))
    silent = data.draw(st.lists(st.floats(0, 1e3), min_size=size, max_size=size))
    silent[mover] = 0.5
    heard = [Heard(beat(rank, idle_s=idle[rank]), silent[rank]) for rank in range(size)]
    assert stuck_ranks(heard) == []


@given(st.sets(st.integers(0, 7), min_size=1, max_size=7), st.booleans())
def test_silent_ranks_are_the_cause_whatever_they_said_last(silent: set[int], was_waiting: bool) -> None:
    heard = [
        Heard(beat(r, is_waiting=was_waiting, idle_s=0.0), 9.0) if r in silent else Heard(beat(r), 1.0)
        for r in range(8)
    ]
    found = find_stuck(heard, 8, timeout_s=TIMEOUT_S, silent_after_s=SILENT_S)
    assert {one.rank for one in found} == silent
    assert {one.silent for one in found} == {beat(rank).process for rank in silent}


@given(st.sets(st.integers(0, 7), min_size=1, max_size=7))
def test_ranks_that_have_not_come_to_a_collective_hold_up_those_that_have(behind: set[int]) -> None:
    heard = [Heard(beat(rank, num_collectives=50 - (rank in behind)), 0.5) for rank in range(8)]
    assert set(stuck_ranks(heard)) == behind


def test_among_equals_those_outside_of_a_collective_are_the_cause_else_all() -> None:
    heard = [Heard(beat(rank, is_waiting=rank != 2), 0.5) for rank in range(4)]
    assert stuck_ranks(heard) == [2]
    assert stuck_ranks([Heard(beat(rank), 0.5) for rank in range(4)]) == [0, 1, 2, 3]


def test_a_rank_that_never_spoke_is_named() -> None:
    assert stuck_ranks([Heard(beat(0), 0.5)], num_ranks=2) == [1]


def test_the_report_says_rank_host_process_phase_step_and_seconds() -> None:
    stuck = find_stuck([Heard(beat(0), 0), Heard(beat(1), 30)], 2, timeout_s=TIMEOUT_S, silent_after_s=SILENT_S)
    verdict = hang(stuck, 2, timeout_s=TIMEOUT_S, exit_code=70)
    assert "rank 1 (host host1, process 101): in forward of step 3 for 110 s" in verdict.reason
    assert verdict.writer == 0 and verdict.silent == (beat(1).process,)
    assert Verdict.from_json(verdict.to_json()) == verdict


@given(st.integers(0, 9), st.floats(0, 1e6), st.text(), st.none() | st.integers(0, 9))
def test_what_a_rank_says_is_read_as_it_was_said(rank: int, idle_s: float, phase: str, step: int | None) -> None:
    said = beat(rank, idle_s=idle_s, phase=phase, step=step)
    assert Beat.from_json(said.to_json()) == said


def test_the_writer_of_the_outcome_is_the_lowest_rank_that_can() -> None:
    assert first_beside({0, 1, 3}, 5) == 2
    assert first_beside({0, 1}, 2) == 0


def slow(works: list[float], *, looks: int = 100) -> dict[int, float]:
    before = {rank: beat(rank, num_looks=0, num_waits=0) for rank in range(len(works))}
    now = {r: beat(r, num_looks=looks, num_waits=round(looks * (1 - share))) for r, share in enumerate(works)}
    return dict(find_slow(before, now, ratio=1.5, min_looks=20))


def test_a_rank_the_others_wait_for_is_slow_and_by_how_much() -> None:
    assert slow([0.5, 1.0, 0.5, 0.5]) == {1: 2.0}


@given(st.lists(st.floats(0.4, 0.55), min_size=1, max_size=8))
def test_ranks_of_about_one_speed_are_not_slow(works: list[float]) -> None:
    assert slow(works) == {}


def test_few_looks_and_ranks_alone_say_nothing() -> None:
    assert slow([0.1, 1.0], looks=19) == {}
    assert slow([1.0]) == {}
