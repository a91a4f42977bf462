"""A second pair of eyes: a small process of its own that kills the sessions of a launch when the launcher
dies without a word (kill -9, out of memory). The kernel's parent-death signal reaches direct children
only, and the ranks of `deepspeed` are great-grandchildren. Session ids in on stdin, one a line; the end of
stdin means that the launcher is gone or done, and then nothing of those sessions may be left."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from launcher.processes import kill_sessions

KILL_TIMEOUT_S = 30.0


class Guard:
    """The launcher's end of the guard: `watch` each session it starts, `close` when all is over."""

    def __init__(self) -> None:
        # A session of its own: neither Ctrl-C nor a kill of the launcher's group may take it along. Its
        # name in `ps` is not that of the launcher, for the sake of `pkill -9 -f sft-launch`.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launcher.guard"],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            bufsize=0,
        )

    def watch(self, session: int) -> None:
        """Have `session` killed when this process dies."""
        assert self._process.stdin is not None
        # Should somebody kill the guard, the launch goes on with the parent-death signal alone.
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{session}\n".encode())

    def close(self) -> None:
        """Let the guard go, after the sessions have ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    sessions = {int(line) for line in sys.stdin}
    kill_sessions(sessions, timeout_s=KILL_TIMEOUT_S)


if __name__ == "__main__":
    main()
