"""Errors that speak to people: one message and one documented exit code each.

Whatever a user can cause or mend is a UserError and is printed without a traceback; any other
exception is a bug and keeps its traceback (exit code 1). Codes follow sysexits.h.
"""

import sys
from contextlib import suppress
from enum import IntEnum


class ExitCode(IntEnum):
    DONE = 0
    BUG = 1
    USAGE = 2
    DATA = 65
    CLUSTER = 69
    TRAINING = 70
    STORAGE = 74
    STOPPED = 75
    NO_PROGRESS = 76  # restarts that brought no new checkpoint; sft-launch ends with it
    CONFIG = 78


class UserError(Exception):
    """Base of every error with a message for people; `exit_code` is what the process ends with."""

    exit_code: int = ExitCode.BUG


class UsageError(UserError):
    """The command line is wrong."""

    exit_code = ExitCode.USAGE


class DataError(UserError):
    """A data file cannot be read, a record is malformed, or nothing is left to work on."""

    exit_code = ExitCode.DATA


class ClusterError(UserError):
    """Ranks, ports, addresses, locks: the surroundings of a run are not as they must be."""

    exit_code = ExitCode.CLUSTER


class TrainingError(UserError):
    """Training cannot go on: a non-finite loss or gradient, a step that was not applied."""

    exit_code = ExitCode.TRAINING


class StorageError(UserError):
    """Files cannot be written, or a checkpoint is damaged."""

    exit_code = ExitCode.STORAGE


class ConfigError(UserError):
    """The run file asks for something impossible, or does not fit what is resumed."""

    exit_code = ExitCode.CONFIG


class Interrupted(BaseException):
    """A signal arrived while there was nothing to checkpoint.

    No Exception: what it interrupts (a library that loads weights, say) would take it for a fault of its own.
    """

    def __init__(self, name: str, number: int) -> None:
        super().__init__(f"stopped by {name} before the first step; nothing to checkpoint")
        self.exit_code = 128 + number


def say(line: str) -> None:
    """One line for people on stderr. A closed terminal is no reason to end."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
