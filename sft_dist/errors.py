"""Errors that speak to people: one message and one documented exit code each.

Whatever a user can cause or mend is a UserError and is printed without a traceback; any other
exception is a bug and keeps its traceback (exit code 1). Codes follow sysexits.h.
"""

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
    CONFIG = 78


class UserError(Exception):
    """Base of every error with a message for people; `exit_code` is what the process ends with."""

    exit_code = ExitCode.BUG


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
