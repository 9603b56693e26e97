"""How long a disk has delivered nothing, and the error when that is too long."""

from __future__ import annotations

import time

from cache.errors import CapError

# A disk or network drive that delivers no photo for this long is assumed to be gone.
STALL_S = 60.0
GLANCE_S = 1.0  # how often the time without a photo is looked at


class StalledError(CapError):
    """Raised when the disk has stopped delivering photos. The message is one line."""


class Silence:
    """How long nothing has come from a disk, while this process was running.

    A process that is suspended, by Ctrl-Z or with its machine, hears nothing either. So the time is
    counted in glances, none of which counts for much longer than it should have taken.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._glance = time.monotonic()
        self._heard = 0
        self.seconds = 0.0

    def is_stall(self, heard: int) -> bool:
        """Glance again, after at most a second. heard: how much has come so far."""
        since, self._glance = self._glance, time.monotonic()
        if heard != self._heard:
            self._heard, self.seconds = heard, 0.0
        else:
            self.seconds += min(self._glance - since, 2 * GLANCE_S)
        return self.seconds > self._stall_s
