"""Measuring a training step: the classic step, the parts of the fast one, its arithmetic limit."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from train.allocator import keep_freed_memory
from train.captions.caption_set import Batch
from train.captions.vocabulary import PAD
from train.config import FixedRecipe
from train.fit.trainer import Trainer
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.step.cpu.matmul import multiply
from train.step.cuda.objective import CudaObjective
from train.step.dropout import draw_masks
from train.step.packed_batch import gather_packed, pack

# How many fast steps a GPU is given at once. It works through them while the host prepares the
# next, as in training.
GPU_STEPS = 64
_PART_REPEATS = 5


class ClassicStep:
    """The baseline: the training step of the CNN-LSTM tutorials, from features on."""

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self._model = CaptionDecoder(config).to(device).train()
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=FixedRecipe().learning_rate)
        self._criterion = nn.CrossEntropyLoss()

    def __call__(self, batch: Batch) -> Tensor:
        """Take one step and return the loss."""
        model = self._model
        lengths = (batch.targets != PAD).sum(1).cpu()
        photo = model.read_photo(batch.features).unsqueeze(1)
        inputs = torch.cat([photo, model.embed(batch.inputs)], 1)
        packed = pack_padded_sequence(inputs, lengths, batch_first=True)
        targets = pack_padded_sequence(batch.targets, lengths, batch_first=True).data
        hidden, _ = model.lstm(packed)
        loss: Tensor = self._criterion(model.head(hidden.data), targets)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.detach()


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, all work on the device included."""
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return 1e3 * (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def without_page_faults(
    step: Callable[[], object], device: torch.device, measurements: int
) -> tuple[float | None, float | None]:
    """(milliseconds of a step while the process keeps the memory it frees, page faults of a step as
    it is); None if the allocator cannot be told. Both ways take turns.
    """
    kept_ms, faults = [], []
    for _ in range(max(2, measurements // 4)):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        try:
            if not keep_freed_memory():
                return None, None
            step()  # what it frees is kept
            kept_ms.append(milliseconds(step, device))
        finally:
            keep_freed_memory(False)
    return statistics.median(kept_ms), statistics.median(faults)


def step_flops(config: DecoderConfig, tokens: float, captions: int) -> float:
    """FLOP of the matrix products of a step: two per weight and row, and twice as many backward."""
    hidden, embedding = config.hidden_size, config.embedding_size
    per_token = 4 * hidden * (embedding + hidden) + (config.num_layers - 1) * 8 * hidden * hidden
    if config.tie_embeddings:
        per_token += hidden * embedding + embedding * config.vocab_size
    else:
        per_token += hidden * config.vocab_size
    return 6.0 * (tokens * per_token + captions * config.feature_dim * embedding)


def product_rate(trainer: Trainer, device: torch.device, tokens: int) -> float:
    """FLOP/s of the largest product of a step, the best of several runs."""
    config = trainer.decoder.config
    inner = config.embedding_size if config.tie_embeddings else config.hidden_size
    words = trainer.parameters.padded_words
    left = torch.randn(-(-tokens // 64) * 64, inner, device=device).to(trainer.objective.dtype)
    right = torch.randn(inner, words, device=device).to(trainer.objective.dtype)
    out = left @ right
    repeats = 20 if device.type == "cuda" else 1  # before the host waits for the device

    def products() -> None:
        for _ in range(repeats):
            multiply(left, right, out)

    best = min(milliseconds(products, device) for _ in range(20)) / repeats
    return 2.0 * left.shape[0] * inner * words / (best / 1e3)


@torch.no_grad()
def parts_ms(trainer: Trainer, chosen: NDArray[np.int64], device: torch.device) -> dict[str, float]:
    """The parts of a fast step one by one, in milliseconds: each several times on one batch.

    chosen: the numbers of the batch's captions.
    """
    captions = trainer.captions
    objective: Any = trainer.objective  # Any, because its parts are private
    smoothing = objective.label_smoothing
    parts: dict[str, Callable[[], object]]
    if isinstance(objective, CudaObjective):
        on_device = torch.from_numpy(chosen).to(device)
        views = torch.full_like(on_device, captions.full_view)
        length = int(captions.lengths[chosen].max())
        parts = {
            "batch": lambda: gather_packed(captions, objective.kernels, on_device, views, length)
        }
        batch = gather_packed(captions, objective.kernels, on_device, views, length)
        buffers: tuple[Any, ...] = (objective._training,)
    else:
        parts = {"batch": lambda: pack(captions.batch(chosen), round_up=True)}
        batch = pack(captions.batch(chosen), round_up=True)
        buffers = ()
    count = batch.count()
    seed = None if device.type == "cuda" else 0
    config = trainer.decoder.config
    masks = draw_masks(config, batch, objective.dtype, seed)
    if config.dropout or config.feature_dropout:
        parts["dropout"] = lambda: draw_masks(config, batch, objective.dtype, seed)
    states = objective._hidden(batch, masks, *buffers, training=True)
    logits = objective._logits(states.before_head, *buffers)
    hidden = () if buffers else (states.before_head,)

    def cross_entropy() -> Any:
        return objective._cross_entropy(batch, logits, *hidden, None, smoothing, *buffers)

    def backward() -> None:
        objective._backward(batch, masks, states, logits, *smoothed)

    smoothed = () if buffers else (cross_entropy()[1] if smoothing else None,)
    parts |= {
        "lstm forward": lambda: objective._hidden(batch, masks, *buffers, training=True),
        "head forward": lambda: objective._logits(states.before_head, *buffers),
        "cross-entropy": cross_entropy,
        "backward": backward,
        "optimizer": lambda: trainer.optimizer.step(count),
    }
    return {name: _part_ms(part, device) for name, part in parts.items()}


def _part_ms(part: Callable[[], object], device: torch.device) -> float:
    """The median of several runs on a CPU; the best of several runs on a GPU.

    A GPU runs the part as a graph, as in training. Kernels launched one by one would wait for the
    host.
    """
    if device.type == "cpu":
        return statistics.median(milliseconds(part, device) for _ in range(_PART_REPEATS))
    part()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        part()

    def replays() -> None:
        for _ in range(GPU_STEPS):
            graph.replay()

    return min(milliseconds(replays, device) for _ in range(_PART_REPEATS)) / GPU_STEPS
