"""What ranks say of themselves, and who among them is stuck, slow or gone. Pure: values in, values out.

A rank makes progress when it enters a phase or a collective. A rank that waits for another one makes none either, so
a hang is that of the whole world, and its cause is found by comparing the ranks: who no longer speaks, who has come to
fewer collectives than the others, who is not in a collective at all. No clock of one host is compared with another's.
"""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from statistics import median
from typing import Literal


@dataclass(frozen=True, slots=True)
class Process:
    """Where a rank runs. The last two tell its process apart from another one that has the same number."""

    host: str
    pid: int
    namespace: str  # of process numbers, with the boot of the kernel
    born: int  # clock ticks after the boot


@dataclass(frozen=True, slots=True)
class Beat:
    """A rank at one moment, in its own words."""

    rank: int
    process: Process
    number: int  # how many beats came before
    phase: str
    step: int | None  # as people count them, from 1
    num_collectives: int  # that it has entered
    idle_s: float  # since it last entered a phase or a collective
    is_waiting: bool  # its main thread is inside a collective
    num_looks: int  # how often the main thread was looked at,
    num_waits: int  # and was found inside a collective

    @property
    def where(self) -> str:
        return self.phase if self.step is None else f"{self.phase} of step {self.step:,}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> "Beat":
        values = json.loads(text)
        return Beat(**values | {"process": Process(**values["process"])})


@dataclass(frozen=True, slots=True)
class Heard:
    """The last beat of a rank, and how long ago the listener first heard it, by the listener's clock."""

    beat: Beat
    silent_s: float

    @property
    def idle_s(self) -> float:
        return self.beat.idle_s + self.silent_s


@dataclass(frozen=True, slots=True)
class Stuck:
    rank: int
    line: str  # for people
    silent: Process | None = None  # that cannot leave by itself


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why all ranks leave: the first that is given counts for all of them."""

    kind: Literal["hang", "failure"]
    exit_code: int
    reason: str  # for people
    writer: int  # the rank that writes the outcome
    silent: tuple[Process, ...] = ()  # of ranks that cannot leave by themselves

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> "Verdict":
        values = json.loads(text)
        silent = tuple(Process(**process) for process in values["silent"])
        return Verdict(**values | {"silent": silent})


def find_stuck(heard: Sequence[Heard], num_ranks: int, *, timeout_s: float, silent_after_s: float) -> list[Stuck]:
    """The ranks that hold up the others; none as long as a rank that speaks has made progress within `timeout_s`."""
    never = sorted(set(range(num_ranks)) - {one.beat.rank for one in heard})
    silent = [one for one in heard if one.silent_s >= silent_after_s]
    speaking = [one for one in heard if one.silent_s < silent_after_s]
    if min((one.idle_s for one in speaking), default=timeout_s) < timeout_s:
        return []
    if silent or never:
        why = "no sign of life: it is stopped, its host is gone, or native code holds the interpreter's lock"
        said = [Stuck(one.beat.rank, _line(one, why), silent=one.beat.process) for one in silent]
        return said + [Stuck(rank, f"rank {rank}: {why}") for rank in never]
    fewest, most = (f(one.beat.num_collectives for one in speaking) for f in (min, max))
    if fewest < most:
        behind = [one for one in speaking if one.beat.num_collectives == fewest]
        why = f"it has entered {fewest:,} collectives, others {most:,}, and these wait for it"
        return [Stuck(one.beat.rank, _line(one, why)) for one in behind]
    if elsewhere := [one for one in speaking if not one.beat.is_waiting]:
        return [
            Stuck(one.beat.rank, _line(one, f"it is outside of any collective, after {fewest:,} of them"))
            for one in elsewhere
        ]
    return [
        Stuck(one.beat.rank, _line(one, f"it waits in collective {fewest:,} like all others: network or GPU"))
        for one in speaking
    ]


def _line(one: Heard, why: str) -> str:
    process = one.beat.process
    where = f"rank {one.beat.rank} (host {process.host}, process {process.pid}): in {one.beat.where}"
    return f"{where} for {one.idle_s:.0f} s; {why}"


def hang(stuck: Sequence[Stuck], num_ranks: int, *, timeout_s: float, exit_code: int) -> Verdict:
    """The verdict that names the stuck ranks."""
    lines = "".join(f"\n  {one.line}" for one in stuck)
    reason = f"no rank has made progress for {timeout_s:g} s (watchdog.timeout_s); stuck:{lines}"
    silent = tuple(one.silent for one in stuck if one.silent is not None)
    return Verdict("hang", exit_code, reason, first_beside({one.rank for one in stuck}, num_ranks), silent)


def first_beside(ranks: Set[int], num_ranks: int) -> int:
    """The lowest rank that is none of these; 0 where these are all."""
    return min(set(range(num_ranks)) - ranks, default=0)


def find_slow(
    before: Mapping[int, Beat], now: Mapping[int, Beat], *, ratio: float, min_looks: int
) -> list[tuple[int, float]]:
    """(rank, how many times the work of a typical other rank) of those the others waited for between two beats.

    Ranks in step with each other differ in how they spend their time: those that are fast wait in collectives. What a
    rank works is the share of looks that did not find it waiting; it is slow where that is `ratio` times the median.
    Differences below a quarter of the time are noise.
    """
    shares = {
        rank: 1 - (beat.num_waits - before[rank].num_waits) / looks
        for rank, beat in now.items()
        if rank in before and (looks := beat.num_looks - before[rank].num_looks) >= min_looks
    }
    found = []
    for rank, share in shares.items():
        others = [other for number, other in shares.items() if number != rank]
        if not others:
            continue
        typical = median(others)
        if share >= ratio * typical and share - typical >= 0.25:
            found.append((rank, share / max(typical, 0.01)))
    return found
