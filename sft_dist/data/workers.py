"""Worker processes for work that needs a costly start: each is given one task at a time and answers it.

Python's own pools leave orphans when their parent is killed; here every worker hangs on one private pipe, and ends when
the other side is gone.
"""

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Generic, TypeVar

from sft_dist.errors import ClusterError, UserError

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class Workers(Generic[Task, Answer]):
    """`num` processes, each of which calls `start` once and then what it returned for every task.

    `start` travels by pickle. Leaving the context ends the processes at once, whatever they do.
    """

    def __init__(self, num: int, start: Callable[[], Callable[[Task], Answer]]) -> None:
        # spawn: forking a process in which a tokenizer or MPI has started threads can deadlock.
        context = get_context("spawn")
        self._processes: dict[Connection, BaseProcess] = {}
        self._idle: list[Connection] = []
        self._busy: set[Connection] = set()
        for _ in range(num):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._processes[ours] = process
        # Not an argument of the process: its start would wait until the new interpreter reads megabytes.
        pickled = pickle.dumps(start)
        for connection in self._processes:
            self._send(connection, pickled)

    def __enter__(self) -> "Workers[Task, Answer]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.kill()
        for connection, process in self._processes.items():
            process.join()
            connection.close()

    def answers(self, tasks: Iterable[Task]) -> Iterator[Answer]:
        """The answers as they come, in no order. Raises what a worker raised, and ClusterError when one died."""
        for task in tasks:
            while not self._idle:
                yield from self._arrived()
            connection = self._idle.pop()
            self._busy.add(connection)
            self._send(connection, pickle.dumps(task))
        while self._busy:
            yield from self._arrived()

    def _arrived(self) -> Iterator[Answer]:
        """Wait for workers that have started or answered."""
        waiting = [connection for connection in self._processes if connection not in self._idle]
        for connection in wait(waiting):
            assert isinstance(connection, Connection)
            answer = self._receive(connection)
            self._idle.append(connection)
            if connection in self._busy:
                self._busy.remove(connection)
                yield answer

    def _send(self, connection: Connection, pickled: bytes) -> None:
        try:
            connection.send_bytes(pickled)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death(connection) from None

    def _receive(self, connection: Connection) -> Answer:
        try:
            answer, error = connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death(connection) from None
        if isinstance(error, UserError):
            raise error
        if error is not None:
            raise RuntimeError(f"in a worker process:\n{error}")
        return answer

    def _death(self, connection: Connection) -> ClusterError:
        process = self._processes[connection]
        process.join()
        code = process.exitcode or 0
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return ClusterError(
            f"a process that tokenises (pid {process.pid}) was {how}; if memory ran out, set data.num_processes "
            "to fewer; what is finished is kept, the next start continues there"
        )


def _serve(connection: Connection) -> None:
    # Launchers and terminals signal whole process groups: the parent decides, and takes us with it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    try:
        work = pickle.loads(connection.recv_bytes())()
        connection.send((None, None))  # ready
        while True:
            task = connection.recv()
            connection.send((work(task), None))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the parent is gone
    except UserError as error:
        connection.send((None, error))
    except Exception:
        connection.send((None, traceback.format_exc()))
