"""What every test run starts from.

Signals as a terminal leaves them, however the tests were started: nohup and background shells ignore some. Examples of
property tests that are the same in every run; HYPOTHESIS_PROFILE=explore draws new ones.
No example has a deadline: machines are slow now and then. In CI a failure is told at once, beside at the end, which a
run that is ended from outside does not reach.
"""

import os
import signal
from collections.abc import Generator

import pytest
from hypothesis import settings

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

_LONGEST_TOLD = 4_000  # characters


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and os.environ.get("CI") == "true":
        terminal = item.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line(f"\n{report.nodeid} ({report.when}):\n{report.longreprtext[-_LONGEST_TOLD:]}")
    return report
