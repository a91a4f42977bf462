"""Faults on purpose: named points of the code at which a process can be made to die, hang, fail or compute nonsense.

For tests alone, and off unless SFT_DIST_FAULTS is set:

    SFT_DIST_FAULTS="save.after_shards:rank=1:step=3:SIGKILL, step.before_backward:step=2:restart=0:nan"

A fault is a point, conditions (all must hold; none means always) and an action. `restart` is how often the run was
started again (SFT_DIST_RESTART, which sft-launch sets, or SLURM_RESTART_COUNT). Actions:

    SIGKILL, SIGSTOP, SIGTERM, ...   send this process that signal
    exit=N                           leave at once with that code, as a crash in native code would
    hang, spin                       wait for ever, letting other threads run or not
    sleep=S                          go on S seconds late
    raise, oserror, memory           RuntimeError; OSError, no space left; MemoryError
    nan                              what the point computes is to become not-a-number: `spoils` answers True
"""

import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from sft_dist.errors import UsageError

VARIABLE = "SFT_DIST_FAULTS"
_CONDITIONS = {"rank", "step", "restart"}
_PLAIN_ACTIONS = {"hang", "spin", "raise", "oserror", "memory", "nan"}


@dataclass(frozen=True, slots=True)
class Fault:
    point: str
    rank: int | None
    step: int | None
    restart: int | None
    action: str
    argument: float

    def fits(self, point: str, rank: int, step: int | None, restart: int) -> bool:
        wanted = ((self.rank, rank), (self.step, step), (self.restart, restart))
        return self.point == point and all(value in (None, actual) for value, actual in wanted)


def reach(point: str, *, rank: int, step: int | None = None) -> None:
    """Say that the code is at `point`; whatever fault is planted there happens. Does nothing without faults."""
    if not os.environ.get(VARIABLE):
        return
    for fault in _planted(os.environ[VARIABLE]):
        if fault.action != "nan" and fault.fits(point, rank, step, _restart(os.environ)):
            _happen(fault)


def spoils(point: str, *, rank: int, step: int | None = None) -> bool:
    """Whether what is computed at `point` is to become not-a-number."""
    if not os.environ.get(VARIABLE):
        return False
    restart = _restart(os.environ)
    return any(f.action == "nan" and f.fits(point, rank, step, restart) for f in _planted(os.environ[VARIABLE]))


@lru_cache(maxsize=1)
def _planted(text: str) -> tuple[Fault, ...]:
    return parse(text)


def parse(text: str) -> tuple[Fault, ...]:
    """The faults that SFT_DIST_FAULTS names. Raises UsageError with the part that cannot be read."""
    return tuple(_parse_one(part.strip()) for part in text.split(",") if part.strip())


def _parse_one(text: str) -> Fault:
    point, *middle, action = text.split(":") if ":" in text else (text, "")
    name, _, argument = action.partition("=")
    known = {"exit", "sleep"} if argument else _PLAIN_ACTIONS | signal.Signals.__members__.keys()
    if name not in known:
        raise UsageError(f"{VARIABLE}: {text!r}: no action {action!r}")
    conditions: dict[str, int] = {}
    for condition in middle:
        key, _, value = condition.partition("=")
        if key not in _CONDITIONS or not value.isdecimal():
            raise UsageError(f"{VARIABLE}: {text!r}: expected rank=N, step=N or restart=N, not {condition!r}")
        conditions[key] = int(value)
    try:
        number = float(argument or 0)
    except ValueError:
        raise UsageError(f"{VARIABLE}: {text!r}: {argument!r} is no number") from None
    return Fault(point, conditions.get("rank"), conditions.get("step"), conditions.get("restart"), name, number)


def _restart(env: Mapping[str, str]) -> int:
    return int(env.get("SFT_DIST_RESTART") or env.get("SLURM_RESTART_COUNT") or 0)


def _happen(fault: Fault) -> None:
    match fault.action:
        case "exit":
            os._exit(int(fault.argument))
        case "sleep":
            time.sleep(fault.argument)
        case "hang":
            while True:
                time.sleep(3600)
        case "spin":
            # A single C call that keeps the interpreter's lock.
            sum(range(10**13))
        case "raise":
            raise RuntimeError(f"planted fault at {fault.point}")
        case "oserror":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), fault.point)
        case "memory":
            raise MemoryError(f"planted fault at {fault.point}")
        case name:
            os.kill(os.getpid(), signal.Signals[name])
