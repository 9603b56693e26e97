"""Run by test_together.py, in two processes at once, which train together.

    python -m tests.train.together WHAT FOLDER PORT [PORT …]

Of the functions below, WHAT names one. Each connection needs a port of its own.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cache.store import open_cache
from tests.train.runs import config
from train.captions.caption_set import caption_set
from train.captions.vocabulary import END, PAD, build_vocabulary
from train.config import BEST, CLASSIC, Recipe, TrainConfig
from train.fit.run import train
from train.fit.trainer import Trainer
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.model.flat_parameters import FlatParameters
from train.step.cuda.graphs import GraphedSteps
from train.step.cuda.objective import CudaObjective
from train.step.processes.group import Processes
from train.step.processes.launch import ProcessesError, launched
from train.step.torch_kernels import TorchKernels

CPU = torch.device("cpu")
WINDOW = "90%"  # of the features
SMALL: dict[str, Any] = {
    "embedding_size": 8, "hidden_size": 16, "epochs": 2, "batch_size": 16, "learning_rate": 0.01,
    "min_count": 1,
}  # fmt: skip
NO_DROPOUT = dataclasses.replace(BEST, **SMALL, num_layers=2, dropout=0.0, feature_dropout=0.0)
RECIPES: dict[str, Recipe] = {
    # The second batch of an epoch has one caption, so one process is idle.
    "classic": dataclasses.replace(CLASSIC, **SMALL | {"batch_size": 89}),
    "best": NO_DROPOUT,
    "as on a GPU": dataclasses.replace(NO_DROPOUT, batch_size=89),
    # The second batch of the epoch has one photo.
    "self-critical": dataclasses.replace(
        NO_DROPOUT, epochs=1, self_critical_epochs=1, self_critical_photos=29
    ),
    "dropout": dataclasses.replace(BEST, **SMALL, dropout=0.3, feature_dropout=0.2),
}


def trained(name: str, folder: Path, processes: Processes | None) -> Trainer:
    """A trainer after all epochs of a recipe, on the cache in a folder."""
    made = untrained(name, folder, processes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.fit.self_critical.sample", drawn_by_photo)
        for epoch in range(made.recipe.all_epochs):
            for step in made.epoch(epoch):
                assert torch.isfinite(step.loss)
    return made


def untrained(name: str, folder: Path, processes: Processes | None) -> Trainer:
    cache, recipe = open_cache(folder / "x.h5"), RECIPES[name]
    vocabulary = build_vocabulary(cache.captions, 1)
    captions = caption_set(cache, vocabulary, device=CPU, max_length=50)
    sizes = DecoderConfig.of_recipe(
        recipe, feature_dim=captions.feature_dim, vocab_size=len(vocabulary)
    )
    torch.manual_seed(0)
    decoder = CaptionDecoder(sizes)
    on_a_gpu = name == "as on a GPU"
    with pytest.MonkeyPatch.context() as patch:
        if on_a_gpu:
            patch.setattr(
                "train.fit.trainer.flat_parameters", partial(FlatParameters, transposed=False)
            )
            patch.setattr("train.fit.trainer.objective_for", gpu_objective)
        made = Trainer(
            decoder,
            captions,
            recipe,
            seed=0,
            vocabulary=vocabulary,
            precision="float32",
            processes=processes,
        )
    if on_a_gpu:
        step = made._gather_and_update if processes is None else made._gather_and_differentiate
        made.graphs = GraphedSteps(step, lambda: 0)
        made.graphs.failure = "there is no GPU"  # so steps are called directly
    return made


def gpu_objective(
    decoder: CaptionDecoder, parameters: FlatParameters, *, dtype: torch.dtype, **options: Any
) -> CudaObjective:
    return CudaObjective(
        decoder, parameters, dtype=dtype, kernels=TorchKernels(CPU, dtype), **options
    )


def drawn_by_photo(decoder: CaptionDecoder, features: Tensor, count: int, **_: Any) -> Tensor:
    """In place of random captions some that follow from the photo alone: (B · count, 4) words."""
    numbers = (features.float().abs().sum(1, keepdim=True) * 1000).long() + torch.arange(count)
    words = torch.stack([4 + numbers % 7, 4 + numbers % 5, 4 + numbers % 3, 0 * numbers], -1)
    words[..., 3] = END
    words = words.reshape(-1, 4)
    short = torch.arange(len(words)) % count == 1
    words[short, 2], words[short, 3] = END, PAD
    return words


def connected(ports: Iterator[str]) -> Processes:
    os.environ["MASTER_PORT"] = next(ports)
    launch = launched()
    assert launch is not None
    return Processes.connect(launch)


def trainers(folder: Path, ports: Iterator[str]) -> None:
    """Train every recipe, and then a run that is interrupted within an epoch."""
    with connected(ports) as processes:
        processes.use(CPU)
        for name in (*RECIPES, "dropout"):
            made = trained(name, folder, processes)
            path = folder / f"{name}.pt"
            if processes.leads:
                again = " again" if path.exists() else ""
                torch.save(made.state(), folder / f"{name}{again}.pt")
        other_weights = untrained("classic", folder, processes)
        other_weights.parameters.values[5] += 1e-6 * processes.rank
        other_batches = untrained("classic", folder, processes)
        other_batches.seed = processes.rank
        for made in (other_weights, other_batches):
            try:
                list(made.epoch(0))
            except ProcessesError as error:
                print(error)
    runs(folder, ports)


def runs(folder: Path, ports: Iterator[str]) -> None:
    """A whole run, and one that is interrupted within an epoch, where this process ends."""
    for _ in train(settings(folder, "whole"), processes=connected(ports)):
        pass
    reports = train(settings(folder, "part"), processes=connected(ports))
    for number, _ in enumerate(reports):
        if number == 9 and os.environ["RANK"] == "0":
            reports.close()
            return
    raise AssertionError("the first process has ended, and this one goes on")


def resumed(folder: Path, ports: Iterator[str]) -> None:
    """The rest of the interrupted run; one with streamed features, of which only the first process
    is told how many; then one in which this process is killed.
    """
    for _ in train(settings(folder, "part", resume=True), processes=connected(ports)):
        pass
    window = WINDOW if os.environ["RANK"] == "0" else "auto"
    for _ in train(streamed(folder, "streamed", window), processes=connected(ports)):
        pass
    reports = train(settings(folder, "killed", epochs=10_000), processes=connected(ports))
    for number, _ in enumerate(reports):
        if number == 9 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)


def settings(
    folder: Path, name: str, epochs: int = 3, dropout: float = 0.2, **changes: Any
) -> TrainConfig:
    cache = open_cache(folder / "x.h5")
    return config(cache, folder / name, epochs=epochs, dropout=dropout, **changes)


def streamed(folder: Path, name: str, window: str) -> TrainConfig:
    return settings(folder, name, epochs=1, dropout=0.0, batch_size=4, window=window)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]), iter(sys.argv[3:]))
