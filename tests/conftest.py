"""What every test run starts from.

Signals as a terminal leaves them, however the tests were started: nohup and background shells ignore some. Examples of
property tests that are the same in every run; HYPOTHESIS_PROFILE=explore draws new ones.
No example has a deadline: machines are slow now and then.
"""

import os
import signal

from hypothesis import settings

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
