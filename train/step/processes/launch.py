"""Whether this process is one of several that `torchrun` has started, and which one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from cache.errors import CapError


class ProcessesError(CapError):
    """Raised when the processes of a training cannot work together. The message is one line."""


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that train together."""

    rank: int  # from 0, over all machines; 0 writes, prints and validates
    count: int  # of processes, at least 2
    local_rank: int  # from 0, on this machine: the number of its GPU

    def own_device(self, device: str) -> str:
        """The name of this process's device among those of a name. `auto` means a GPU here, too."""
        return f"cuda:{self.local_rank}" if device in ("auto", "cuda") else device


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """What `torchrun` says of this process in its environment; None: it is alone.

    Raises ProcessesError if that is not what `torchrun` would say.
    """
    if environment.get("WORLD_SIZE", "1") == "1" or "RANK" not in environment:
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = {name: environment.get(name, "") for name in names}
    numbers = [values[name] for name in names[:3]]
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        raise ProcessesError(_said(values) + "; start with torchrun, or unset these variables")
    rank, count, local_rank = map(int, numbers)
    if rank >= count or not values["MASTER_ADDR"] or not values["MASTER_PORT"]:
        raise ProcessesError(_said(values) + "; start with torchrun, or unset these variables")
    return Launch(rank, count, local_rank)


def _said(values: Mapping[str, str]) -> str:
    said = ", ".join(f"{name}={value}" for name, value in values.items())
    return f"the environment names processes that cannot train together ({said})"
