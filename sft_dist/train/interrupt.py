"""Being asked to stop: a signal sets a flag, and all ranks agree on the step at which they act on it."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType

from sft_dist.distributed.collectives import all_max

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Installs handlers for SIGTERM, SIGINT and SIGUSR1. A second SIGINT leaves at once, without a checkpoint."""

    def __init__(self) -> None:
        self._received: int | None = None
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._received == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
        self._received = number
        # os.write, not print: a handler may interrupt a print that holds the stream's lock.
        # A closed terminal (Ctrl-C ends `tee` too) must not cost the checkpoint.
        with suppress(OSError):
            os.write(sys.stderr.fileno(), f"\n{signal.Signals(number).name}: stopping after this step\n".encode())

    def agreed(self) -> str | None:
        """The name of a signal that any rank received, the same on every rank; None if none did. A collective."""
        highest = int(all_max([float(self._received or 0)])[0])
        return signal.Signals(highest).name if highest else None
