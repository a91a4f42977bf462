"""Signals that ask a verb to stop. Until training takes them over (train/interrupt.py) the first one unwinds the verb,
so that it can clean up."""

import signal
from types import FrameType
from typing import NoReturn

from sft_dist.errors import Interrupted

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def unwind_on_signals() -> None:
    """From here on the first of STOPPING raises Interrupted, or KeyboardInterrupt. What nohup ignores stays ignored."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _unwind)


def ignore_signals() -> None:
    """How the verb ends is decided: nothing interrupts that it is told."""
    for number in STOPPING:
        # Not SIG_IGN: of a signal that is on its way just then Python would say that it ignores it.
        signal.signal(number, lambda *_: None)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    # Handlers and not masks: any thread of a library may take a signal that the main thread blocks.
    ignore_signals()
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Interrupted(signal.Signals(number).name, number)
