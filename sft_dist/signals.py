"""Signals that ask a verb to stop. Until training takes them over (train/interrupt.py) the first one unwinds the verb,
so that it can clean up."""

import os
import signal
import time
from functools import partial
from types import FrameType
from typing import NoReturn

from sft_dist.errors import Interrupted

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PATIENCE_S = 5.0  # a Ctrl-C this long after the first signal leaves at once: cleaning up hangs


def unwind_on_signals() -> None:
    """From here on the first of STOPPING raises Interrupted, or KeyboardInterrupt. What a shell had ignored (SIGINT of
    a job with `&` in a script) stays ignored."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _unwind)


def ignore_signals() -> None:
    """How the verb ends is decided: nothing but an impatient Ctrl-C interrupts that it is told."""
    # Not SIG_IGN: of a signal that is on its way just then Python would say that it ignores it.
    pass_over = partial(_pass_over, time.monotonic())
    for number in STOPPING:
        signal.signal(number, pass_over)


def _pass_over(since_s: float, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and time.monotonic() - since_s > PATIENCE_S:
        os._exit(128 + number)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    # Handlers and not masks: any thread of a library may take a signal that the main thread blocks.
    ignore_signals()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Interrupted(signal.Signals(number).name, number)
