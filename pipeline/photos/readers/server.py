"""The process that reader processes are forked from.

A reader needs torch for its resize, whose import takes a second or two. So this process imports it
once, while the process that it works for does the same, and then forks as many readers as are
wanted. It has one thread, so that forking is safe. It tells which reader has ended, and ends all of
them when its parent ends, however that happens.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import warnings
from multiprocessing.connection import Connection

from train.torch_import import import_torch

_GLANCE_S = 0.1


def main() -> None:
    """Fork readers and watch them.

    The argument names descriptors: of the connection to the parent, of the memory, and of each
    reader's connection to the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    warnings.filterwarnings("ignore")  # about odd photos; and about forking, which is safe here
    control_number, memory, *numbers = map(int, sys.argv[1].split(","))
    import_torch()
    from pipeline.photos.memory_budget import share_budgets
    from pipeline.photos.readers import reader

    share_budgets()
    processes: dict[int, int] = {}  # process → number of the reader
    for index, number in enumerate(numbers):
        process = os.fork()
        if process == 0:
            try:
                for other in {control_number, *numbers} - {number}:
                    os.close(other)
                reader.serve(Connection(number), memory)
            finally:
                os._exit(0)
        processes[process] = index
    for number in numbers:
        os.close(number)
    os.close(memory)
    try:
        _watch(Connection(control_number), processes)
    finally:
        for process in processes:
            os.kill(process, signal.SIGKILL)
        os._exit(0)


def _watch(control: Connection, processes: dict[int, int]) -> None:
    """Report which readers end, as (number, exit code), until the parent closes the connection."""
    while not select.select([control], [], [], _GLANCE_S)[0]:
        while processes:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                break
            code = os.waitstatus_to_exitcode(status)
            try:
                control.send((processes.pop(process), code))
            except (BrokenPipeError, ConnectionResetError):
                return
