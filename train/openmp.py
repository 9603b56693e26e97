"""Sets how PyTorch's CPU threads wait for one another."""

from __future__ import annotations

import os

# Each of these sets how OpenMP's threads wait. GNU's library reads the first two, Intel's and
# LLVM's read the others.
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_SPINS = "1000"


def spin_briefly() -> None:
    """Let waiting threads give up their core soon, unless the user's environment says otherwise.

    GNU's OpenMP spins for milliseconds first. On a busy machine the thread that the others wait for
    may have no core during that time. Beside two busy processes on two cores, training took 4 to 50
    times as long as alone; with a short spin, twice as long. Alone it makes no difference.

    OpenMP reads its settings when PyTorch is imported, so call this before. Child processes inherit
    the setting.
    """
    if not any(name in os.environ for name in _SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = _SPINS
