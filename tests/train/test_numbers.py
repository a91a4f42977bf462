"""What is done about the numbers of a step follows from the numbers, the run file and what was done before."""

import json
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sft_dist.config import CheckpointConfig, NumbersConfig
from sft_dist.train.checkpoint import TrainState
from sft_dist.train.numbers import (
    History,
    Verdict,
    judge_loss,
    last_regular,
    narrow,
    on_non_finite,
    robust_z,
)

LOSSES = st.floats(0.0, 50.0)
NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])


def histories(**fixed: Any) -> st.SearchStrategy[History]:
    steps = st.lists(st.integers(1, 40), unique=True, max_size=5).map(lambda s: tuple(sorted(s)))
    ranges = st.lists(st.tuples(st.integers(1, 9), st.integers(9, 20)), max_size=3).map(tuple)
    drawn = {"losses": st.lists(LOSSES, max_size=8).map(tuple), "skipped": steps, "rollbacks": ranges}
    return st.builds(History, **(drawn | {"num_alarms": st.integers(0, 3)} | fixed))


@given(NOT_FINITE, histories(), st.sampled_from(["alarm", "rollback"]), st.integers(0, 9))
def test_no_number_that_is_not_finite_is_ever_taken(loss: float, history: History, spike: Any, target: int) -> None:
    for policy in ("stop", "skip"):
        verdict = judge_loss(loss, history, NumbersConfig(non_finite=policy, spike=spike), last_regular=target)
        assert verdict.action in ("stop", "skip") and verdict.z is None
        assert verdict.action == "stop" or policy == "skip"


@given(histories(), st.integers(0, 6))
def test_exactly_as_many_steps_are_left_out_as_allowed(history: History, allowed: int) -> None:
    numbers = NumbersConfig(non_finite="skip", max_skipped=allowed)
    for step in range(100):
        if on_non_finite(history, numbers).action == "stop":
            break
        history = history.after_skipping(100 + step)
    assert len(history.skipped) >= allowed
    assert sum(step >= 100 for step in history.skipped) <= allowed


@given(st.lists(LOSSES, min_size=1, max_size=30), LOSSES, st.floats(-5, 5), st.floats(0.1, 10))
def test_the_z_score_is_the_textbook_one_and_does_not_depend_on_the_unit(
    past: list[float], value: float, shift: float, scale: float
) -> None:
    spread = float(np.median(np.abs(np.array(past) - np.median(past))))
    assume(spread > 0.02 * abs(np.median(past)) + 1e-6)
    expected = 0.6745 * (value - np.median(past)) / spread
    assert robust_z(value, past) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert robust_z(value * scale, [x * scale for x in past]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_z_score_estimates_standard_deviations_and_outliers_do_not_move_it() -> None:
    past = np.random.default_rng(0).normal(3.0, 0.25, 4001)
    assert robust_z(4.0, past.tolist()) == pytest.approx(4.0, rel=0.05)
    past[:400] = 1e9
    assert robust_z(4.0, past.tolist()) == pytest.approx(4.0, rel=0.25)


def test_losses_that_hardly_differ_make_no_spike_of_a_small_step() -> None:
    assert robust_z(2.01, [2.0] * 50) < 1 < 10 < robust_z(2.5, [2.0] * 50)
    assert math.isfinite(robust_z(1.0, [0.0] * 50))


@given(st.lists(st.floats(1.0, 1.2), min_size=4, max_size=12), histories(rollbacks=st.just(())))
def test_a_spike_is_judged_by_a_full_window_and_nothing_but_the_policy(losses: list[float], history: History) -> None:
    history = History(tuple(losses), history.skipped)
    spiky = NumbersConfig(spike_window=len(losses))
    assert judge_loss(9.0, history, spiky, last_regular=0).action == "take"
    assert judge_loss(9.0, history, spiky, last_regular=0).z is not None, "an alarm"
    assert judge_loss(0.1, history, spiky, last_regular=0) == Verdict("take"), "a low loss is no spike"
    assert judge_loss(9.0, history, NumbersConfig(spike_window=13), last_regular=3) == Verdict("take")
    back = NumbersConfig(spike_window=len(losses), spike="rollback", max_rollbacks=1)
    assert judge_loss(9.0, history, back, last_regular=3).action == "roll back"
    assert judge_loss(9.0, history, back, last_regular=0).action == "take", "nowhere to go back to"
    again = history.after_rollback(history, to=3, step=5)
    verdict = judge_loss(9.0, again, back, last_regular=3)
    assert verdict.action == "stop" and "numbers.max_rollbacks" in verdict.reason


@given(st.lists(st.one_of(LOSSES, NOT_FINITE), min_size=1, max_size=40), st.integers(1, 7), st.data())
def test_an_interruption_changes_no_verdict(losses: list[float], every: int, data: st.DataObject) -> None:
    """A run over given losses, and one that is stopped anywhere and goes on from what its manifest says.

    The loss of a step depends on the weights, so that after going back a run sees other losses.
    """
    numbers = NumbersConfig(non_finite="skip", max_skipped=3, spike="rollback", spike_window=4, spike_threshold=3.0)
    checkpoints = CheckpointConfig(every=every)

    def run(stops: set[int]) -> tuple[list[Any], TrainState]:
        state, verdicts, saved = TrainState(), [], {}
        while state.step < len(losses):
            step = state.step
            if step in stops:
                state = TrainState(**json.loads(json.dumps(asdict(state))))
            target = last_regular(step, numbers, checkpoints)
            loss = losses[step] + 10 * len(state.history.rollbacks)
            verdict = judge_loss(loss, state.history, numbers, last_regular=target)
            verdicts.append((step, verdict))
            history = state.history if verdict.z is None else state.history.after_alarm()
            match verdict.action:
                case "take":
                    history = history.after_taking(loss, numbers.spike_window)
                case "skip":
                    history = history.after_skipping(step + 1)
                case "roll back":
                    history = history.after_rollback(saved[target], to=target, step=step + 1)
                case "stop":
                    break
            state = TrainState(step=step + 1, history=history)
            if (step + 1) % every == 0:
                saved[step + 1] = state.history
        return verdicts, state

    stops = data.draw(st.sets(st.integers(0, len(losses))))
    assert run(stops) == run(set())


@given(st.integers(0, 500), st.integers(1, 50))
def test_a_rollback_goes_to_the_newest_checkpoint_of_the_schedule(step: int, every: int) -> None:
    target = last_regular(step, NumbersConfig(spike="rollback"), CheckpointConfig(every=every))
    assert target % every == 0 and target <= step < target + every
    assert last_regular(step, NumbersConfig(), CheckpointConfig(every=every)) == 0, "nothing is kept for an alarm"


@given(st.lists(LOSSES, max_size=30), st.integers(4, 9))
def test_the_history_holds_the_losses_of_the_window(losses: list[float], window: int) -> None:
    history = History()
    for loss in losses:
        history = history.after_taking(loss, window)
    assert history.losses == tuple(losses[-window:])


def test_untrained_steps_are_those_skipped_and_those_given_up() -> None:
    history = History(skipped=(2, 5), rollbacks=((4, 6), (4, 8)))
    assert history.untrained == [2, 4, 5, 6, 7, 8]


GROUPS = st.lists(st.lists(st.integers(0, 10**6), max_size=12), max_size=6)


@given(GROUPS, st.data())
def test_narrowing_finds_every_item_that_is_bad_by_itself_and_no_other(groups: list[list[int]], data: Any) -> None:
    items = [tuple((g, i) for i in range(len(group))) for g, group in enumerate(groups)]
    everything = [item for group in items for item in group]
    bad = data.draw(st.sets(st.sampled_from(everything))) if everything else set()
    found = narrow(items, lambda part: bool(bad & set(part)), max_tests=10_000)
    assert sorted(found) == sorted((item,) for item in bad)


@given(st.integers(2, 40), st.integers(0, 30), st.data())
def test_narrowing_ends_within_its_tests_and_loses_no_bad_item(size: int, max_tests: int, data: Any) -> None:
    group = tuple(range(size))
    bad = data.draw(st.sets(st.sampled_from(group), min_size=1))
    tests = []

    def is_bad(part: tuple[int, ...]) -> bool:
        tests.append(part)
        return bool(bad & set(part))

    found = narrow([group], is_bad, max_tests=max_tests)
    assert len(tests) <= max_tests + 1
    assert bad <= {item for part in found for item in part}


def test_items_that_are_bad_only_together_are_named_together() -> None:
    found = narrow([(0, 1, 2, 3), (4, 5)], lambda part: {1, 2} <= set(part), max_tests=100)
    assert found == [(0, 1, 2, 3)], "its halves are both good"


def test_few_bad_items_among_many_cost_few_tests() -> None:
    tests = []
    found = narrow([tuple(range(4096))], lambda part: tests.append(part) or 77 in part, max_tests=200)
    assert found == [(77,)] and len(tests) == 1 + 2 * 12
