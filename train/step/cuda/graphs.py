"""Training steps as CUDA graphs: a step is some ninety kernels and one launch.

A graph has fixed shapes, so there is one for each number of captions and length of the longest
one; all work in the same buffers, the objective's. A longer batch than any before makes these
grow, and the graphs that point into the old ones are thrown away.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)
# A capture takes as long as some ten direct steps. Most lengths come hundreds of times an epoch;
# the few long batches have lengths of their own each, so these are rounded up to share a graph.
_SIGHTS_BEFORE_CAPTURE = 2
_EXACT_LENGTHS = 20
_LENGTH_MULTIPLE = 8


def graph_length(length: int) -> int:
    """The length that a batch whose longest caption has `length` targets is computed with."""
    if length <= _EXACT_LENGTHS:
        return length
    return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    loss: Tensor


class GraphedSteps:
    """Calls `step(captions (B,), views (B,), T)` on the GPU: directly for a shape that is new, as
    a captured graph from then on.

    step: without synchronisation; returns a scalar. Everything else that changes from step to step
    it must read from tensors.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor, int], Tensor], generation: Callable[[], int]
    ) -> None:
        """generation: a number that changes whenever the step's buffers have moved."""
        self._step = step
        self._generation = generation
        self._captured_in = generation()
        self._sights: dict[tuple[int, int], int] = {}
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = None  # of graph memory, shared: replays follow one another
        # Of its own: in PyTorch after 2.11 whoever drops a graph takes cuBLAS's workspace from all
        # graphs that were captured on the same stream (its issue 193402).
        self._stream: torch.cuda.Stream | None = None
        self.failure = ""  # why no graph could be captured; everything is called directly then

    def run(self, captions: Tensor, views: Tensor, length: int) -> Tensor:
        """One step on what `StepInputs.send` returned, whose longest caption has no more targets
        than `length`. Returns the loss, on the device.
        """
        shape = (len(captions), length)
        self._forget_if_moved()
        captured = self._captured.get(shape)
        if captured is None:
            self._sights[shape] = self._sights.get(shape, 0) + 1
            if self.failure or self._sights[shape] <= _SIGHTS_BEFORE_CAPTURE:
                loss = self._step(captions, views, length)
                self._forget_if_moved()
                return loss
            captured = self._capture(captions, views, length)
            if captured is None:
                return self._step(captions, views, length)
            self._captured[shape] = captured
        captured.graph.replay()
        return captured.loss.clone()

    def _forget_if_moved(self) -> None:
        if self._generation() != self._captured_in:
            self._forget()
            self._captured_in = self._generation()

    def _forget(self) -> None:
        """All graphs at once: they share what dropping one takes away."""
        if self._captured and self._stream is not None:
            torch.cuda.synchronize(self._stream.device)  # some may still be running
        self._captured.clear()
        self._pool = None  # a pool whose graphs are gone cannot be captured into again

    def _capture(self, captions: Tensor, views: Tensor, length: int) -> _Captured | None:
        """None, and `failure` says why, if it cannot be done."""
        before: torch.cuda.Stream | None = None
        try:
            graph = torch.cuda.CUDAGraph()
            before = torch.cuda.current_stream(captions.device)
            self._stream = self._stream or torch.cuda.Stream(captions.device)
            # thread_local: whatever other threads ask of CUDA meanwhile does not matter.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                loss = self._step(captions, views, length)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # What broke it off, not that the capture then could not end.
            self.failure = str(error.__context__ or error).splitlines()[0]
            _log.warning("no CUDA graphs (%s): training goes on without, slower", self.failure)
            self._forget()
            if before is not None:
                _recover(before)
            return None
        self._pool = self._pool or graph.pool()
        return _Captured(graph, loss)


def _recover(before: torch.cuda.Stream) -> None:
    """After a capture that failed: PyTorch leaves its stream the current one, and the generator of
    random numbers refusing to draw outside of it until another capture has ended well.
    """
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=before.device)
    torch.cuda.set_stream(before)
