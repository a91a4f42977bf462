"""How fast a run is and what its time goes to: tokens per second, utilisation, seconds of each phase of each step.

Phases partition the time of a step, from its beginning to that of the next. On a GPU they are marked by events in the
stream, so that they say what the GPU did or waited for, and are read when the GPU has reached them: nothing waits.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from sft_dist.data.cost import CostModel

Phase = Literal["data", "forward", "backward", "step", "checkpoint", "evaluate", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Mark = float | torch.cuda.Event  # seconds of the host's clock, or a place in the GPU's stream


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where the time of a finished step went."""

    step: int
    seconds: dict[Phase, float]

    @property
    def shares(self) -> dict[str, float]:
        """0 to 1, of the whole time until the next step began."""
        return _shares(self.seconds)


class PhaseClock:
    """Attributes all time since the first `begin` to the phase that was entered last.

    `tell` hears of every phase that is entered, and of its step as people count them.
    """

    def __init__(self, device: torch.device, tell: Callable[[str, int | None], None] | None = None) -> None:
        self._device = device
        self._tell = tell
        self._step: int | None = None
        self._marks: list[tuple[Phase, Mark]] = []
        self._closed: list[tuple[int, list[tuple[Phase, Mark]], Mark]] = []

    def begin(self, step: int) -> None:
        """The step before ends here; what comes is `other` until a phase is entered."""
        self.end()
        self._step = step
        self.enter("other")

    def enter(self, phase: Phase) -> None:
        if self._tell is not None:
            self._tell(phase, None if self._step is None else self._step + 1)
        if self._step is not None:
            self._marks.append((phase, self._mark()))

    def end(self) -> None:
        """The current step ends here; no other begins."""
        if self._step is not None:
            self._closed.append((self._step, self._marks, self._mark()))
        self._step, self._marks = None, []

    def finished(self) -> list[StepTimes]:
        """Steps that have ended and whose marks the device has reached, each once."""
        done = []
        while self._closed and _is_reached(self._closed[0][-1]):
            done.append(_times(*self._closed.pop(0)))
        return done

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _is_reached(mark: Mark) -> bool:
    return isinstance(mark, float) or mark.query()


def _times(step: int, marks: Sequence[tuple[Phase, Mark]], end: Mark) -> StepTimes:
    seconds = dict.fromkeys(PHASES, 0.0)
    ends = [*(mark for _, mark in marks[1:]), end]
    for (phase, begin), until in zip(marks, ends, strict=True):
        seconds[phase] += _between(begin, until)
    return StepTimes(step, seconds)


def _between(begin: Mark, end: Mark) -> float:
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert not isinstance(end, float)
    return begin.elapsed_time(end) / 1_000


@dataclass(frozen=True, slots=True)
class Speed:
    tokens_per_s: float  # of all ranks together
    target_tokens_per_s: float
    mfu: float | None  # 0 to 1, model FLOPs over those of the peak, by the exact formula for packed samples
    mfu_palm: float | None  # the same by the PaLM formula, as others report it


@dataclass(frozen=True, slots=True)
class Work:
    """What steps computed, over all ranks, and the seconds they took; works add up."""

    num_tokens: int = 0
    num_targets: int = 0
    model_flops: float | None = 0.0  # exact, of packed samples; None where the model's cost is unknown
    palm_flops: float | None = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.num_tokens + other.num_tokens,
            self.num_targets + other.num_targets,
            _sum(self.model_flops, other.model_flops),
            _sum(self.palm_flops, other.palm_flops),
            self.seconds + other.seconds,
        )

    def speed(self, flops_per_s: float) -> Speed:
        """`flops_per_s`: the peak of all ranks together."""

        def utilisation(flops: float | None) -> float | None:
            return None if flops is None else flops / (self.seconds * flops_per_s)

        return Speed(
            self.num_tokens / self.seconds,
            self.num_targets / self.seconds,
            utilisation(self.model_flops),
            utilisation(self.palm_flops),
        )


class Meter:
    """What a run measures of itself. `flops_per_s`: what all its devices together could do at their peak."""

    def __init__(self, clock: PhaseClock, cost: CostModel | None, *, flops_per_s: float, row_length: int) -> None:
        self.clock = clock
        self._cost = cost
        self.flops_per_s = flops_per_s
        self._row_length = row_length  # of the PaLM formula, which knows no samples
        self._work = Work()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def add(self, lengths: NDArray[np.integer], num_targets: int, seconds: float) -> Speed:
        """Count a step over samples of these lengths, over all ranks; returns the speed of this step."""
        num_tokens = int(lengths.sum())
        exact = palm = None
        if self._cost is not None:
            exact = self._cost.flops(lengths, num_targets)
            palm = self._cost.palm_flops(num_tokens, self._row_length)
        work = Work(num_tokens, num_targets, exact, palm, seconds)
        self._work += work
        return work.speed(self.flops_per_s)

    def finished(self) -> list[StepTimes]:
        """Times of steps that are over and not yet told of."""
        times = self.clock.finished()
        for of_step in times:
            for phase, seconds in of_step.seconds.items():
                self._seconds[phase] += seconds
        return times

    def speed(self) -> Speed | None:
        """Of all steps that were counted; None where there is none."""
        return self._work.speed(self.flops_per_s) if self._work.seconds else None

    def shares(self) -> dict[str, float]:
        """Of all finished steps: phase to its share of the time, 0 to 1."""
        return _shares(self._seconds)


def shares_line(shares: dict[str, float]) -> str:
    """`data 0.1%, forward 31.0%, backward 61.9%, step 5.0%, checkpoint 2.0%`, of phases that took any time."""
    return ", ".join(f"{phase} {share:.1%}" for phase, share in shares.items() if share)


def _shares(seconds: dict[Phase, float]) -> dict[str, float]:
    total = sum(seconds.values())
    return {phase: of_phase / total if total else 0.0 for phase, of_phase in seconds.items()}


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second
