"""Processes that were forked from one with a model in it."""

from __future__ import annotations

import os

from cache.errors import CapError


class ForkError(CapError):
    """Raised in a process that was forked after a model was loaded. The message is one line."""


class _Forks:
    """Whether this process was forked from one that had loaded a model.

    The threads with which PyTorch computes are not there after a fork, and OpenMP would wait for
    them for ever.
    """

    def __init__(self) -> None:
        self._loaded = self._forked = False
        os.register_at_fork(after_in_child=self._note)

    def _note(self) -> None:
        self._forked = self._loaded

    def about_to_load(self) -> None:
        """Raises ForkError."""
        self.check()
        self._loaded = True

    def check(self) -> None:
        """Raises ForkError."""
        if self._forked:
            raise ForkError(
                "this process was forked after Captioner.load, and the threads that compute did "
                "not come along; load in each worker, after the fork, and not before it"
            )


forks = _Forks()
