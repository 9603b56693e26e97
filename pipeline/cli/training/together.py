"""Commands that `torchrun` has started several times: only `cap train` can share its work, and only
the first process speaks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.cli.terminal import say
from train.step.processes.launch import Launch, ProcessesError, launched

if TYPE_CHECKING:
    from train.step.processes.group import Processes

_LONG_S = 10.0  # that processes started together do not need to find each other


def is_follower() -> bool:
    """Whether this is one of several processes, and not the first."""
    try:
        launch = launched()
    except ProcessesError:  # which the command says
        return False
    return launch is not None and launch.rank > 0


@contextlib.contextmanager
def only_the_first_speaks() -> Iterator[None]:
    """Within this context other processes than the first write nothing, so that whatever concerns
    all of them is said once. What concerns one of them alone reaches the first by
    `Processes.fail`. Tracebacks are written.
    """
    if not is_follower():
        yield
        return
    # With any text, as the usual streams.
    with open(os.devnull, "w", encoding="utf-8", errors="backslashreplace") as nowhere:
        own = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = own


def company_of(command: str) -> str | None:
    """Why this command cannot be one of several processes, in one line; None if it is alone or may
    be.
    """
    try:
        launch = launched()
    except ProcessesError:  # which matters to `cap train` alone
        return None
    if launch is None or command == "train":
        return None
    return (
        f"cap {command} works in one process, and torchrun has started {launch.count}; start it "
        "without torchrun, or unset RANK and WORLD_SIZE"
    )


def connect(launch: Launch) -> Processes:
    """Connect with the other processes of a launch. Raises ProcessesError.

    While this waits for them, Ctrl-C ends the process at once, as SIGTERM does.
    """
    from train.step.processes.group import Processes

    text = f"waiting for all {launch.count} processes that WORLD_SIZE={launch.count} promises"
    notice = threading.Timer(_LONG_S, say, [text])
    notice.daemon = True
    notice.start()
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return Processes.connect(launch)
    finally:
        signal.signal(signal.SIGINT, before)
        notice.cancel()


@contextlib.contextmanager
def signals_left_to_the_first() -> Iterator[None]:
    """Within this context Ctrl-C and SIGTERM are ignored.

    torchrun passes them to all processes. The first one ends training after a step, which needs the
    others, and then lets them go.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.signal(each, signal.SIG_IGN) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
