"""What every process but the first one does when several train together.

It reads the same cache and computes the same epochs, but it writes, prints and validates nothing.
Weights, optimizer and position come from the first process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from cache.errors import CapError
from cache.store import open_cache
from train.config import TrainConfig
from train.device import resolve_device
from train.fit.data_recipe import fit_to_data
from train.fit.processes.leader import (
    DATA,
    DEVICE,
    EPOCH,
    RECORDED,
    RULES,
    SETTINGS,
    STEP,
    WINDOW,
    heard_layout,
    with_own_device,
)
from train.fit.record.run_folder import TrainError
from train.fit.resume import data_identity, run_settings
from train.fit.run_data import load_run_data
from train.fit.trainer import Trainer
from train.model.start_model import load_start_model, new_decoder
from train.step.cuda.kernel_choice import begin_kernels
from train.step.objective import product_dtype
from train.step.processes.group import Processes


def follow(config: TrainConfig, processes: Processes) -> Iterator[None]:
    """Train with the first process until it says that training is done. Yields after each step.

    An error is told to the first process, which says it, and raised. Raises CapError or what
    PyTorch raises.
    """
    with processes:
        try:
            told = processes.hear()
            trainer = _set_up(config, processes, told)
            processes.use(trainer.captions.device)
            trainer.start_together()
            while told := processes.hear():
                for _ in trainer.epoch(told[EPOCH], told[STEP]):
                    yield None
        except (CapError, OSError, RuntimeError, MemoryError) as error:
            processes.fail(next(iter(str(error).splitlines()), "") or type(error).__name__)
            raise


def _set_up(config: TrainConfig, processes: Processes, told: dict[str, Any]) -> Trainer:
    """As the first process sets up its run, but for the run's folder."""
    config = with_own_device(config, processes)
    device = resolve_device(config.device)
    if device.type != told[DEVICE]:
        raise TrainError(f"trains on {device.type}, the first process on {told[DEVICE]}")
    if device.index is not None:
        torch.cuda.set_device(device)  # seeds and graphs belong to the current device
    begin_kernels(device, product_dtype(device, config.precision))
    cache = open_cache(config.from_cache)
    config, recipe = fit_to_data(config, cache, told[RECORDED])
    start = load_start_model(config.from_model, cache) if config.from_model else None
    config = dataclasses.replace(config, window=told[WINDOW])
    _check_alike(config, told, data_identity(cache) | {"from_model": start.sha256 if start else ""})
    data = load_run_data(config, recipe, cache, device, told[RULES], start, heard_layout(told))
    torch.manual_seed(config.seed)
    captions = len(data.training_captions)
    decoder = new_decoder(recipe, cache, data.vocabulary, start, captions)
    return Trainer(
        decoder.to(device),
        data.training_captions,
        recipe,
        seed=config.seed,
        vocabulary=data.vocabulary,
        precision=config.precision,
        processes=processes,
    )


def _check_alike(config: TrainConfig, told: dict[str, Any], data: dict[str, str]) -> None:
    """Raise TrainError if this process would train with other settings or on other data."""
    for name, value in run_settings(config).items():
        if told[SETTINGS][name] != value:
            raise TrainError(f"has {name} {value}, the first process {told[SETTINGS][name]}")
    for name, text in data.items():
        if told[DATA][name] != text:
            model = name == "from_model"
            file = config.from_model if model else config.from_cache
            what = "is another model than" if model else f"holds other {name} than"
            raise TrainError(f"{file}: {what} that of the first process")
