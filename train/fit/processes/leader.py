"""The first process's side of training together: what it tells the others.

What it tells them first are the choices that a checkpoint records, since the others read no file of
the run. Then it tells each epoch, and in the end that training is done. Within an epoch all of them
do the same, so nothing has to be told.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from train.captions.streaming.window import Layout
from train.config import TrainConfig
from train.fit.record.run_folder import TrainError
from train.fit.run_data import LayoutOfEpoch
from train.step.processes.group import Processes
from train.step.processes.launch import ProcessesError

EPOCH, STEP = "epoch", "step"
DEVICE, RECORDED, RULES = "device", "recorded", "data_rules"
WINDOW, LAYOUT = "window", "layout"
SETTINGS, DATA = "settings", "data"


@contextlib.contextmanager
def leading(processes: Processes | None) -> Iterator[None]:
    """A context in which this process leads the others; in the end it lets them go."""
    if processes is None:
        yield
        return
    with processes:
        yield
        with contextlib.suppress(ProcessesError):  # training is done
            processes.tell({})


def with_own_device(config: TrainConfig, processes: Processes) -> TrainConfig:
    """The settings with the device of this process.

    Raises TrainError if several processes cannot train with these settings.
    """
    if config.plain:
        raise TrainError("--plain trains in one process; leave it out, or start without torchrun")
    device = config.device
    if device not in ("auto", "cpu", "cuda"):
        raise TrainError(
            f"--device {device}: torchrun gives each process a GPU of its own; use cuda, cpu or "
            "auto, and choose the GPUs with CUDA_VISIBLE_DEVICES"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return dataclasses.replace(config, device=processes.launch.own_device(device))


def tell_followers(
    processes: Processes,
    device: torch.device,
    *,
    recorded: Mapping[str, Any] | None,
    rules: int,
    settings: Mapping[str, Any],
    data: Mapping[str, str],
    window: str,
    interrupted: LayoutOfEpoch | None,
) -> None:
    """Tell what a run needs to be set up alike, and what must be alike.

    recorded, rules: the settings and the `DATA_RULES` of the checkpoint. settings, data: as
    `run_settings` and `data_identity` give them. window: as `--window`. interrupted: how the epoch
    goes through its photos that was interrupted, if one was.
    """
    layout = None
    if interrupted is not None:
        layout = [] if interrupted.layout is None else list(dataclasses.astuple(interrupted.layout))
    processes.tell(
        {
            DEVICE: device.type,
            RECORDED: None if recorded is None else dict(recorded),
            RULES: rules,
            SETTINGS: dict(settings),
            DATA: dict(data),
            WINDOW: window,
            LAYOUT: layout,
        }
    )


def heard_layout(told: Mapping[str, Any]) -> LayoutOfEpoch | None:
    """What `tell_followers` was given as `interrupted`."""
    layout = told[LAYOUT]
    if layout is None:
        return None
    return LayoutOfEpoch(Layout(*layout) if layout else None)


def tell_epoch(processes: Processes, epoch: int, step: int) -> None:
    """Tell the others to train this epoch from this step on."""
    processes.tell({EPOCH: epoch, STEP: step})
