"""Training steps as CUDA graphs: a step is some hundred small kernels and one launch.

A graph has fixed shapes, so there is one for each length of the longest caption; all work in the
same buffers, the objective's. A longer batch than any before makes these grow, and the graphs that
point into the old ones are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.batches import CaptionSet


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    loss: Tensor


class GraphedSteps:
    """Calls `step(captions (B,), views (B,), T)` on the GPU: directly for a shape seen once, as a
    captured graph from then on.

    step: without synchronisation; returns a scalar. Everything else that changes from step to step
    it must read from tensors.
    """

    def __init__(
        self,
        step: Callable[[Tensor, Tensor, int], Tensor],
        captions: CaptionSet,
        generation: Callable[[], int],
    ) -> None:
        """generation: a number that changes whenever the step's buffers have moved."""
        self._step = step
        self._captions = captions
        self._generation = generation
        self._captured_in = generation()
        self._seen: set[tuple[int, int]] = set()
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}  # captions and views, by batch size
        self._pool: Any = None  # of graph memory, shared: replays follow one another

    def run(self, captions: NDArray[np.int64], views: NDArray[np.int64] | None) -> Tensor:
        """One step on these captions, in any order. Returns the loss, on the device."""
        count, length = len(captions), int(self._captions.lengths[captions].max())
        chosen, seen = self._buffers(count)
        chosen.copy_(torch.from_numpy(captions).pin_memory(), non_blocking=True)
        if views is None:
            seen.fill_(self._captions.full_view)
        else:
            seen.copy_(torch.from_numpy(views).pin_memory(), non_blocking=True)
        shape = (count, length)
        self._forget_if_moved()  # validation works in the same buffers
        if shape not in self._seen:
            self._seen.add(shape)
            loss = self._step(chosen, seen, length)
            self._forget_if_moved()
            return loss
        if shape not in self._captured:
            self._captured[shape] = self._capture(chosen, seen, length)
        captured = self._captured[shape]
        captured.graph.replay()
        return captured.loss.clone()

    def _forget_if_moved(self) -> None:
        if self._generation() != self._captured_in:
            self._captured.clear()
            self._pool = None  # a pool whose graphs are gone cannot be captured into again
            self._captured_in = self._generation()

    def _buffers(self, count: int) -> tuple[Tensor, Tensor]:
        if count not in self._inputs:
            device = self._captions.device
            self._inputs[count] = (
                torch.empty(count, dtype=torch.int64, device=device),
                torch.empty(count, dtype=torch.int64, device=device),
            )
        return self._inputs[count]

    def _capture(self, captions: Tensor, views: Tensor, length: int) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            loss = self._step(captions, views, length)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, loss)
