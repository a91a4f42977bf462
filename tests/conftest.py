"""Signals as a terminal leaves them, however the tests were started: nohup and background shells ignore some."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
