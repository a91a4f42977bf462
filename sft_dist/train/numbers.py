"""What to do about the numbers of a step: take it, leave it out, go back to a checkpoint, or stop.

Pure decisions over frozen values. In: a loss, a gradient norm, what happened before. Out: a verdict. All that a verdict
depends on is in the run file and in `History`, which every checkpoint carries: an interruption changes none.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, TypeVar

from sft_dist.config import CheckpointConfig, NumbersConfig

T = TypeVar("T")
Action = Literal["take", "skip", "roll back", "stop"]

# Losses that hardly differ from each other would make any next one an outlier: a MAD below this share of the median
# counts as this share.
_SMALLEST_SPREAD = 0.01


@dataclass(frozen=True, slots=True)
class History:
    """What verdicts follow from. Steps are counted from 1, as people see them."""

    losses: tuple[float, ...] = ()  # of the last steps taken, at most numbers.spike_window of them
    skipped: tuple[int, ...] = ()  # steps left out because their numbers were not finite
    rollbacks: tuple[tuple[int, int], ...] = ()  # (first, last) steps that each rollback gave up
    num_alarms: int = 0

    @staticmethod
    def read(saved: dict[str, Any]) -> "History":
        """The history as JSON has it. Raises TypeError or ValueError for anything else."""
        return History(
            losses=tuple(saved["losses"]),
            skipped=tuple(saved["skipped"]),
            rollbacks=tuple((int(first), int(last)) for first, last in saved["rollbacks"]),
            num_alarms=int(saved["num_alarms"]),
        )

    @property
    def untrained(self) -> list[int]:
        """The steps whose samples the weights have never been trained on."""
        given_up = {step for first, last in self.rollbacks for step in range(first, last + 1)}
        return sorted(given_up | set(self.skipped))

    def after_taking(self, loss: float, window: int) -> "History":
        return replace(self, losses=(*self.losses, loss)[-window:])

    def after_skipping(self, step: int) -> "History":
        return replace(self, skipped=(*self.skipped, step))

    def after_alarm(self) -> "History":
        return replace(self, num_alarms=self.num_alarms + 1)

    def after_rollback(self, saved: "History", *, to: int, step: int) -> "History":
        """Back at what was saved after step `to`; what happened since stays counted."""
        return replace(self, losses=saved.losses, rollbacks=(*self.rollbacks, (to + 1, step)))


@dataclass(frozen=True, slots=True)
class Verdict:
    action: Action
    z: float | None = None  # how far the loss lies above those before; None where it raises no alarm
    reason: str = ""  # why the run stops


def judge_loss(loss: float, history: History, numbers: NumbersConfig, *, last_regular: int) -> Verdict:
    """Before the optimizer step. `last_regular`: the step of the newest checkpoint to go back to, 0 for none."""
    if not math.isfinite(loss):
        return on_non_finite(history, numbers)
    z = robust_z(loss, history.losses) if len(history.losses) >= numbers.spike_window else 0.0
    if z <= numbers.spike_threshold:
        return Verdict("take")
    if numbers.spike == "alarm" or not last_regular:
        return Verdict("take", z)
    if len(history.rollbacks) >= numbers.max_rollbacks:
        return Verdict("stop", z, f"this run has gone back {len(history.rollbacks)} time(s), numbers.max_rollbacks")
    return Verdict("roll back", z)


def on_non_finite(history: History, numbers: NumbersConfig) -> Verdict:
    """For a loss or a gradient norm that is no finite number."""
    if numbers.non_finite == "stop":
        return Verdict("stop", reason="numbers.non_finite is stop")
    if len(history.skipped) >= numbers.max_skipped:
        return Verdict("stop", reason=f"this run has left out {len(history.skipped)} step(s), numbers.max_skipped")
    return Verdict("skip")


def robust_z(value: float, past: Sequence[float]) -> float:
    """How many robust standard deviations `value` lies above the median of `past` (one value at least).

    0.6745 (x - median) / MAD, with MAD the median of absolute deviations from the median: the modified z-score of
    Iglewicz and Hoaglin, "How to Detect and Handle Outliers", ASQC 1993. Half of the past may be outliers themselves.
    """
    middle = median(past)
    spread = median(abs(x - middle) for x in past)
    return 0.6745 * (value - middle) / max(spread, _SMALLEST_SPREAD * abs(middle), 1e-12)


def last_regular(step: int, numbers: NumbersConfig, checkpoint: CheckpointConfig) -> int:
    """The finished step whose checkpoint a rollback would go back to, when `step` steps are finished; 0: none.

    Only those that checkpoint.every asks for: one that was written because somebody stopped the run must not change
    where it goes back to.
    """
    if numbers.spike != "rollback":
        return 0
    return step // checkpoint.every * checkpoint.every


def narrow(
    groups: Sequence[tuple[T, ...]], is_bad: Callable[[tuple[T, ...]], bool], *, max_tests: int
) -> list[tuple[T, ...]]:
    """The smallest sets of items that are bad, from groups that may be, by halving every set that is.

    A bad set of several items stays whole where neither half of it is bad, and where the tests are used up.
    """
    waiting = deque(group for group in groups if group)
    bad: deque[tuple[T, ...]] = deque()
    found: list[tuple[T, ...]] = []
    while waiting:
        group = waiting.popleft()
        if is_bad(group):
            bad.append(group)
    tests_left = max_tests
    while bad:
        group = bad.popleft()
        if len(group) == 1 or tests_left < 2:
            found.append(group)
            continue
        tests_left -= 2
        halves = (group[: len(group) // 2], group[len(group) // 2 :])
        bad_halves = [half for half in halves if is_bad(half)]
        bad.extend(bad_halves)
        if not bad_halves:
            found.append(group)
    return found
