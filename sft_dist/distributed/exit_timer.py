"""Things that happen to this process when Python has not run for too long: they need no interpreter to happen.

A thread that keeps the interpreter's lock, in a loop of native code, stops every other Python thread of its process,
a watchdog's too. `postpone` is to be called again and again by such a thread; when it no longer can, the stacks of all
threads go to stderr, and a process whose main thread goes on computing after that is ended.
"""

import ctypes
import faulthandler
import sys
import threading
import time

_SIGEV_THREAD = 2  # <signal.h>: call a function in a thread of its own


class _SigEvent(ctypes.Structure):
    _fields_ = [
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("reserved", ctypes.c_char * 64),
    ]


class _TimerSpec(ctypes.Structure):
    """struct itimerspec: the interval (none), then the first expiry, each in seconds and nanoseconds."""

    _fields_ = [("_interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2)]


class ExitTimer:
    """Stacks after `stacks_s` of time, the end with `exit_code` after `end_s` of the main thread's computing time.

    Computing time, since a whole job that was suspended for an hour has passed every deadline of the other kind.
    """

    def __init__(self, *, stacks_s: float, end_s: float, exit_code: int) -> None:
        self._stacks_s, self._end_s = stacks_s, end_s
        libc = ctypes.CDLL(None, use_errno=True)
        leave = ctypes.cast(libc._exit, ctypes.c_void_p).value
        # glibc before 2.34 has timers in a library of their own.
        self._libc = libc if hasattr(libc, "timer_create") else ctypes.CDLL("librt.so.1", use_errno=True)
        event = _SigEvent(value=exit_code, notify=_SIGEV_THREAD, function=leave)
        clock = time.pthread_getcpuclockid(threading.main_thread().ident or 0)
        self._timer = ctypes.c_void_p()
        self._check(self._libc.timer_create(ctypes.c_int(clock), ctypes.byref(event), ctypes.byref(self._timer)))

    def postpone(self) -> None:
        """Both count from now on."""
        faulthandler.dump_traceback_later(self._stacks_s, file=sys.__stderr__ or sys.stderr)
        self._set(self._end_s)

    def cancel(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._set(0.0)

    def _set(self, seconds: float) -> None:
        spec = _TimerSpec(value=(ctypes.c_long * 2)(int(seconds), int(seconds % 1 * 1e9)))
        self._check(self._libc.timer_settime(self._timer, 0, ctypes.byref(spec), None))

    @staticmethod
    def _check(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), "timer")
