"""The checks of training with several processes that `gpu_check.py` runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace

import torch
from gpu_check_steps import Figures, Run
from gpu_check_training import FULL, SMALL, TrainingSetting, _caption_set, _trainer

from train.config import BEST, TrainConfig
from train.fit.run import train
from train.step.processes.group import Processes
from train.step.processes.launch import Launch

# Without dropout, processes differ from one process by the order of sums alone. A GPU adds in any
# order, so two runs of one process differ, too.
_LOSS_BOUND, _WEIGHTS_BOUND = 0.02, 0.02
_RECIPE = replace(
    BEST,
    embedding_size=64,
    hidden_size=96,
    batch_size=64,
    epochs=2,
    learning_rate=1e-3,
    min_count=1,
    dropout=0.0,
    feature_dropout=0.0,
)


def sums_of_one_process_change_nothing(run: Run) -> Figures:
    """Trains with and without an all-reduce (NCCL on a GPU), of one process."""
    setting = _setting(run)
    captions, vocabulary = _caption_set(setting)
    usual = _trainer(captions, vocabulary, _RECIPE, precision="float32")
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "RANK": "0", "WORLD_SIZE": "1",
    }  # fmt: skip
    with Processes.connect(Launch(rank=0, count=1, local_rank=0)) as processes:
        processes.use(setting.device)
        summing = _trainer(captions, vocabulary, _RECIPE, precision="float32", processes=processes)
        losses = [
            torch.stack([step.loss for epoch in range(2) for step in trainer.epoch(epoch)]).cpu()
            for trainer in (usual, summing)
        ]
        captured = 0
        if summing.graphs is not None:
            assert summing.graphs.failure == "", summing.graphs.failure
            captured = len(summing.graphs._captured)
            assert captured > 0
    difference = float((losses[0] - losses[1]).abs().max())
    assert difference < _LOSS_BOUND, difference
    return {"steps": len(losses[0]), "graphs": captured, "largest_difference": difference}


def processes_reach_what_one_does(run: Run) -> Figures:
    """Compares training in this process and in those that torchrun starts: two, or one if there is
    only one GPU.
    """
    setting = _setting(run)
    _caption_set(setting)
    config = TrainConfig(
        from_cache=setting.work / "captions.h5",
        out=setting.work / "one",
        recipe=_RECIPE,
        val_share=0.1,
        patience=9,
        precision="float32",
        device=str(setting.device),
    )
    for _ in train(config):
        pass
    on_gpu = setting.device.type == "cuda"
    count = min(2, torch.cuda.device_count()) if on_gpu else 2
    several = replace(config, out=setting.work / "several", device=setting.device.type)
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)),
            *("--master-port", _free_port(), "-m", "pipeline", "train", *_options(several)),
        ],
        check=True,
    )
    weights = []
    for out in (config.out, several.out):
        state = torch.load(out / "checkpoint.pt", weights_only=True)["trainer"]["average"]
        # BatchNorm takes this bias out, so it follows from rounding alone.
        values = [value for key, value in state.items() if key != "project.bias"]
        weights.append(torch.cat([value.flatten() for value in values]).double())
    difference = float((weights[0] - weights[1]).norm() / weights[0].norm())
    assert difference < _WEIGHTS_BOUND, difference
    return {"processes": count, "difference_of_weights": difference}


STEPS = {
    step.__name__: step
    for step in (sums_of_one_process_change_nothing, processes_reach_what_one_does)
}


def _setting(run: Run) -> TrainingSetting:
    work = run.work / "processes"  # the other checks of training run beside these
    work.mkdir(exist_ok=True)
    return TrainingSetting(torch.device(run.device), work, SMALL if run.small else FULL)


def _options(config: TrainConfig) -> list[str]:
    """The settings that differ from those of `cap train`, as its options."""
    usual, options = vars(BEST), []
    changed = {name: value for name, value in vars(config.recipe).items() if value != usual[name]}
    names = ("from_cache", "out", "val_share", "patience", "precision", "device")
    for name, value in (changed | {name: getattr(config, name) for name in names}).items():
        options += [f"--{name.replace('_', '-')}", str(value)]
    return options


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
