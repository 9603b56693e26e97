"""When the steps of a run are logged, how fast they were, and how long training takes at most."""

from __future__ import annotations

import time

from train.config import FixedRecipe

# Log lines by time, where `log_every` does not count their steps: at least so many steps each, and
# after the first few of a run at least so long. A GPU makes a thousand steps in half a second.
_STEPS, _FIRST_LINES, _PAUSE_S = 10, 10, 0.25


class Pace:
    """The clock of a run, from the start of this process on."""

    def __init__(self, recipe: FixedRecipe, log_every: int | None) -> None:
        """log_every: steps between log lines; None: by time."""
        self._recipe, self._log_every = recipe, log_every
        self._lines = 0
        self._logged_at = time.perf_counter()
        # Of the last epoch that was trained whole, and the validation after it.
        self._epoch_s: float | None = None
        self._validation_s = 0.0

    def begin_epoch(self) -> None:
        """Count the time of the next log line from now."""
        self._logged_at = time.perf_counter()

    def is_time_to_log(self, step: int, count: int) -> bool:
        """After `step` steps of the epoch, `count` of them since the last log line."""
        if self._log_every is not None:
            return step % self._log_every == 0
        if count < _STEPS:
            return False
        pause_s = _PAUSE_S if self._lines >= _FIRST_LINES else 0.0
        return time.perf_counter() - self._logged_at >= pause_s

    def since_last_line(self) -> float:
        """Seconds since the last log line, or since the epoch began; a new line begins now."""
        now = time.perf_counter()
        seconds, self._logged_at = now - self._logged_at, now
        self._lines += 1
        return seconds

    def end_epoch(self, seconds: float, validation_s: float) -> None:
        """Take in the time of a whole epoch. validation_s: the part after its last step."""
        self._epoch_s, self._validation_s = seconds, validation_s

    def seconds_left(self, epoch: int, steps: int, step_s: float) -> float | None:
        """Until the last epoch of this kind is done, if none is left out.

        epoch: the present one, from 0. steps: left in it. step_s: seconds a step. None before an
        epoch has shown how long its validation takes.
        """
        if self._epoch_s is None:
            return None
        recipe = self._recipe
        last = recipe.all_epochs if epoch >= recipe.epochs else recipe.epochs
        return steps * step_s + self._validation_s + (last - epoch - 1) * self._epoch_s
