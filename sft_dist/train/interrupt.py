"""Being asked to stop: a signal sets a flag, the end of the job draws near, and all ranks agree on the step at which
they act on it."""

import math
import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType

from sft_dist.distributed.collectives import all_max
from sft_dist.signals import STOPPING
from sft_dist.train import deadline

_TIME_LIMIT = 0.5  # below every signal's number: a signal, if there is one, is the reason given


class StopRequest:
    """Installs handlers for SIGTERM, SIGINT and SIGUSR1. A second SIGINT leaves at once, without a checkpoint.

    `end_s` is when the job will be ended, in seconds since 1970; the run stops `margin_s` before, and earlier where
    steps take long.
    """

    def __init__(self, *, end_s: float = math.inf, margin_s: float = 0.0) -> None:
        self._received: int | None = None
        self._end_s = end_s
        self._margin_s = margin_s
        self._asked_at: float | None = None
        self._longest_step_s = 0.0
        for number in STOPPING:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
        self._received = number
        # os.write, not print: a handler may interrupt a print that holds the stream's lock.
        # A closed terminal (Ctrl-C ends `tee` too) must not cost the checkpoint.
        with suppress(OSError):
            os.write(sys.stderr.fileno(), f"\n{signal.Signals(number).name}: stopping after this step\n".encode())

    def agreed(self, *, saving_s: float) -> str | None:
        """What asks for a stop, the same on every rank: the name of a signal that any rank received, or that the time
        limit is near, where saving may take `saving_s`; None if nothing does. A collective, called once a step."""
        highest = all_max([float(self._received or 0) or (_TIME_LIMIT if self._time_is_up(saving_s) else 0.0)])[0]
        if highest == _TIME_LIMIT:
            return "the job's time limit"
        return signal.Signals(int(highest)).name if highest else None

    def _time_is_up(self, saving_s: float) -> bool:
        now_s = time.monotonic()
        if self._asked_at is not None:
            self._longest_step_s = max(self._longest_step_s, now_s - self._asked_at)
        self._asked_at = now_s
        return deadline.is_near(
            self._end_s,
            now_s=time.time(),
            longest_step_s=self._longest_step_s,
            saving_s=saving_s,
            margin_s=self._margin_s,
        )
