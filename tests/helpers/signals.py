"""Signals as they were, after a test in which a verb took them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from sft_dist.signals import STOPPING


@contextmanager
def restored_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
