"""Ctrl-C and SIGTERM where there is nothing to finish first: one line, no traceback. Nothing here loads torch.

A training loop finishes what it has begun: engine/distributed.py, Ending.
"""

import os
import signal
import sys
from contextlib import suppress

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
last_words = None  # a function without arguments: what is done, and how to go on


def leave_at_once():
    """From now on Ctrl-C and SIGTERM end the process where it is, with status 130 or 143 and one line of rank 0."""
    for number in SIGNALS:
        signal.signal(number, _leave)


def _leave(number, _):
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    with suppress(Exception):  # the signal may have interrupted another print
        sys.stdout.flush()
    if int(os.environ.get("RANK", 0)) == 0:
        words = f": {last_words()}" if last_words else ""
        os.write(2, f"\nstopped by {SIGNALS[number]}{words}\n".encode())
    os._exit(128 + number)
