"""How far preparation is: seen by the other ranks as signs of work, by people as one line every two seconds."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType

from sft_dist.data.partial import Counts, Partial
from sft_dist.errors import say

SAY_EVERY_S = 2.0
# Signs of work end when a process has not moved for so long: the others then do its work.
_STUCK_S = 600.0


class Progress:
    """Where this process is."""

    def __init__(self) -> None:
        self.share_read = 0.0  # of the bytes of all sources, at the last row
        self._at_chunk: tuple[int, float] = (0, 0.0)  # chunks, and the share that was read with the last of them
        self._moved: float | None = None

    def read_chunk(self, num_chunks: int) -> None:
        self._at_chunk = num_chunks, self.share_read

    def move(self) -> None:
        self._moved = time.monotonic()

    def rest(self) -> None:
        self._moved = None

    @property
    def is_working(self) -> bool:
        return self._moved is not None and time.monotonic() - self._moved < _STUCK_S

    @property
    def num_chunks(self) -> float | None:
        """All there are, as far as what is read tells."""
        num_chunks, share = self._at_chunk
        return num_chunks / share if share else None


class Reporter:
    """A thread beside the work: tokenising one chunk may take longer than people and other ranks want to wait."""

    def __init__(self, partial: Partial, progress: Progress, *, is_main: bool) -> None:
        self._partial = partial
        self._progress = progress
        self._is_main = is_main
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Reporter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        before = self._partial.finished() if self._is_main else []
        while not self._ended.wait(SAY_EVERY_S):
            if self._progress.is_working:
                self._partial.touch()
            if self._is_main:
                finished = self._partial.finished()
                say(progress_line(before, finished, self._progress.num_chunks, time.monotonic() - started))


def progress_line(
    before: Sequence[Counts], finished: Sequence[Counts], num_chunks: float | None, elapsed_s: float
) -> str:
    """Counts of all complete chunks; rate and time to go from those that came since `before`."""
    total, known = sum(finished, Counts()), sum(before, Counts())
    rate = (total.num_tokens - known.num_tokens) / elapsed_s
    share, eta = "-", "-"
    if num_chunks:
        done = min(1.0, len(finished) / num_chunks)
        share = f"{done:.0%}"
        if len(finished) > len(before):
            left = max(0.0, num_chunks - len(finished)) / (len(finished) - len(before))
            eta = duration(left * elapsed_s)
    refused = f"  {total.num_refused:,} refused" if total.num_refused else ""
    return (
        f"prepare  {share}  {total.num_records:,} records  {total.num_tokens:,} tokens  {rate:,.0f} tokens/s{refused}"
        f"  eta {eta}"
    )


def duration(seconds: float) -> str:
    """`2h41m`, `3m05s`, `12s`"""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"
