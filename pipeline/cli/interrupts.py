"""Ctrl-C before a command begins: there is nothing to keep yet, and nothing to say."""

from __future__ import annotations

import os
import signal


def leave_at_once() -> None:
    """Until `command_begins`, Ctrl-C ends the process with exit code 130 and without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, _leave)


def command_begins() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(signum: int, frame: object) -> None:
    os._exit(130)
