"""Signals as a terminal has them: a job in the background, or under nohup, ignores some of them, and
the programs that tests start would inherit that.
"""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
