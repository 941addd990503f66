"""Signals and threads that do not depend on where the tests are started.

A job in the background, or under nohup, ignores some signals, and the programs that tests start
would inherit that. And a CPU run without OMP_NUM_THREADS measures how many threads are fastest: two
runs that a test compares bitwise could come to different numbers, which round sums differently.
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
