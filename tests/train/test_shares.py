"""What one process of several computes: its share of a batch."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train.test_cpu_objective import (
    BATCHES,
    OPTIONS,
    assert_same_gradients,
    decoder,
)
from train.captions.caption_set import Batch
from train.captions.vocabulary import PAD
from train.model.decoder import CaptionDecoder
from train.model.flat_parameters import FlatParameters
from train.step.cpu.objective import CpuObjective
from train.step.cuda.objective import CudaObjective
from train.step.dropout import draw_masks
from train.step.packed_batch import PackedBatch, pack
from train.step.processes.group import Processes
from train.step.processes.launch import Launch, ProcessesError, launched
from train.step.torch_kernels import TorchKernels

CPU = torch.device("cpu")
TORCHRUN = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node", "MASTER_PORT": "29500"
}  # fmt: skip


def test_torchruns_environment_says_which_process_this_is() -> None:
    assert launched(TORCHRUN) == Launch(rank=1, count=2, local_rank=0)
    assert launched({}) is None
    assert launched(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert launched({"WORLD_SIZE": "8"}) is None


@pytest.mark.parametrize(
    "changes", [{"RANK": "2"}, {"RANK": "one"}, {"LOCAL_RANK": ""}, {"MASTER_ADDR": ""}], ids=str
)
def test_a_strange_environment_is_an_error(changes: dict[str, str]) -> None:
    ((name, value),) = changes.items()
    with pytest.raises(ProcessesError, match=f"{name}={value}.*; start with torchrun, or unset"):
        launched(TORCHRUN | changes)


@pytest.mark.parametrize(
    ("asked", "own"), [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cpu", "cpu"), ("cuda:3", "cuda:3")]
)
def test_each_process_has_the_gpu_of_its_number(asked: str, own: str) -> None:
    assert Launch(rank=5, count=8, local_rank=0).own_device(asked) == own


def process(rank: int, count: int) -> Processes:
    """Without a connection."""
    made = Processes.__new__(Processes)
    made.rank, made.count = rank, count
    return made


@pytest.mark.parametrize("size", [1, 2, 3, 4, 128])
def test_shares_are_all_of_the_batch_and_of_equal_size(size: int) -> None:
    shares = [process(rank, 3).share_of(size) for rank in range(3)]
    own = [list(range(size))[share] for share, idle in shares if not idle]
    assert sorted(n for numbers in own for n in numbers) == list(range(size))
    assert max(map(len, own)) - min(map(len, own)) <= 1
    assert [idle for _, idle in shares] == [rank >= size for rank in range(3)]
    assert all(len(range(size)[share]) == 1 for share, idle in shares if idle)


def packed_share(batch: Batch, share: slice, *, round_up: bool) -> PackedBatch:
    targets = batch.targets[share]
    longest = int((targets != PAD).sum(1).max())
    own = Batch(batch.features[share], batch.inputs[share, : longest - 1], targets[:, :longest])
    packed = pack(own, round_up=round_up)
    return dataclasses.replace(packed, features=batch.features, share=share)


def objective(model: CaptionDecoder, device: str, smoothing: float) -> CpuObjective | CudaObjective:
    options: dict[str, Any] = {"dtype": torch.float32, "label_smoothing": smoothing}
    if device == "cpu":
        return CpuObjective(model, FlatParameters(model, transposed=True), **options)
    kernels = TorchKernels(CPU, torch.float32)
    return CudaObjective(model, FlatParameters(model, transposed=False), kernels=kernels, **options)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_all_shares_add_up_to_those_of_the_batch(
    options: dict[str, float], batch_name: str, device: str
) -> None:
    options = dict(options)
    smoothing, batch = options.pop("label_smoothing"), BATCHES[batch_name]
    whole_model = decoder(**options)
    models = [copy.deepcopy(whole_model) for _ in range(3)]
    whole = objective(whole_model, device, smoothing)
    expected = whole.loss_and_gradients(pack(batch, round_up=device == "cpu"))
    total, losses = torch.zeros_like(whole.parameters.gradients), 0.0
    for rank, model in enumerate(models):
        one = objective(model, device, smoothing)
        share, idle = process(rank, 3).share_of(len(batch.targets))
        packed = packed_share(batch, share, round_up=device == "cpu")
        weights = torch.zeros(len(packed.words)) if idle else None
        losses += float(one.loss_and_gradients(packed, weights=weights))
        total += one.parameters.gradients
        for name, buffer in whole_model.named_buffers():  # BatchNorm measures all photos
            assert torch.equal(model.get_buffer(name), buffer)
    one.parameters.gradients.copy_(total)
    assert losses == pytest.approx(float(expected), rel=1e-5)
    assert_same_gradients(models[-1], whole_model, 2e-5)


@pytest.mark.parametrize("seed", [3, None], ids=["on the host", "on the device"])
def test_processes_drop_the_same_features_and_other_states(seed: int | None) -> None:
    config = decoder(dropout=0.5, feature_dropout=0.5).config
    packed = pack(BATCHES["ragged"], round_up=True)

    def masks(rank: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        drawn = draw_masks(config, packed, torch.float32, seed, rank)
        assert drawn.features is not None
        assert drawn.inputs is not None
        return drawn.features, drawn.inputs

    alone, first, second = masks(0), masks(1), masks(2)
    for features, _ in (first, second):
        assert torch.equal(features, alone[0])
    inputs = torch.stack([alone[1], first[1], second[1]]).flatten(1) > 0
    pairs = ((0, 1), (0, 2), (1, 2))
    agreement = np.array([float((inputs[a] == inputs[b]).float().mean()) for a, b in pairs])
    assert np.abs(agreement - 0.5).max() < 0.1  # as of coins
