"""What a rank wrote, and its end for those who ask why it failed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO

NUM_TAIL_LINES = 20
TAIL_BYTES = 65_536


@dataclass(frozen=True)
class Log:
    """Where a process writes, and where in that file this launch began."""

    path: Path
    start: int


@dataclass(frozen=True)
class Quote:
    """The last lines of a log, and where the whole of it lies."""

    source: str
    lines: tuple[str, ...]


def tail(log: Log, *, num_lines: int = NUM_TAIL_LINES) -> list[str]:
    """The last lines this launch wrote to `log`; of a line redrawn in place, its last state.

    Of a log that has gone, or whose disk has, the one line that it cannot be read: how a rank ended counts for more.
    """
    try:
        with log.path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(log.start, size - TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError as error:
        return [f"log cannot be read: {error.strerror}"]
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-num_lines:]


def open_log(folder: Path, name: str) -> tuple[Log, IO[bytes]]:
    """The log of the process `name` in `folder`, and the file to append to."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(' ', '-')}.log"
    file = path.open("ab")
    return Log(path, file.tell()), file
