"""What every test run starts from.

Signals as a terminal leaves them, however the tests were started: nohup and background shells ignore some. Examples of
property tests that are the same in every run; HYPOTHESIS_PROFILE=explore draws new ones.
No example has a deadline: machines are slow now and then. In CI a failure is told at once, beside at the end, which a
run that is ended from outside does not reach.
"""

import os
import signal

import pytest
from hypothesis import settings

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

_LONGEST_TOLD = 4_000  # characters


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and os.environ.get("CI") == "true" and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} ({report.when}):\n{report.longreprtext[-_LONGEST_TOLD:]}", flush=True)


def pytest_collection_finish() -> None:
    """Workers side by side compute with one thread each: threads that spin for a core others have are slower."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)
