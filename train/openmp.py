"""How the threads that PyTorch computes with on a CPU wait for one another."""

from __future__ import annotations

import os

# Any of these says how OpenMP's threads wait: GNU's library reads the first two, Intel's and LLVM's
# the others.
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_SPINS = "1000"


def spin_briefly() -> None:
    """Let a thread that waits for others give its core away soon, unless the user chose otherwise.

    GNU's OpenMP spins for milliseconds first. Beside two busy processes on two cores the thread
    waited for has no core meanwhile: training takes 4 to 50 times as long as alone, with a short
    spin twice as long. Alone it makes no difference.

    OpenMP reads its settings when PyTorch is imported: call this before. Child processes inherit
    them.
    """
    if not any(name in os.environ for name in _SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
