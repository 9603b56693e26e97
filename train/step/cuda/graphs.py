"""Training steps as CUDA graphs: one launch starts the ninety or so kernels of a step.

A graph has fixed shapes, so there is one for each pair of a number of captions and a length of the
longest one. All of them work in the objective's buffers. When a batch is longer than any before,
the buffers grow and the graphs that hold their old addresses are dropped.
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
# A capture takes as long as about ten direct steps. Most lengths occur hundreds of times an epoch.
# The few long batches all differ in length, so their lengths are rounded up to share a graph.
_DIRECT_STEPS = 2  # of a shape, before it is captured
_EXACT_LENGTHS = 20
_LENGTH_MULTIPLE = 8


def graph_length(length: int) -> int:
    """The number of steps to compute for a batch whose longest caption has `length` targets."""
    if length <= _EXACT_LENGTHS:
        return length
    return -(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    loss: Tensor


class GraphedSteps:
    """Calls `step(captions (B,), views (B,), T)` on the GPU: directly at first, and as a captured
    graph once a shape has come several times.

    step: returns a scalar and never waits for the device. It must read everything else that changes
    from step to step from tensors.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor, int], Tensor], generation: Callable[[], int]
    ) -> None:
        """generation: returns a number that changes whenever the step's buffers have moved."""
        self._step = step
        self._generation = generation
        self._captured_in = generation()
        self._calls: dict[tuple[int, int], int] = {}  # per shape, while it has no graph
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = None  # of memory, shared by all graphs because they never run together
        # A stream for captures alone: in PyTorch after 2.11, dropping a graph takes cuBLAS's
        # workspace from all graphs that were captured on the same stream (PyTorch issue 193402).
        self._stream: torch.cuda.Stream | None = None
        self.failure = ""  # why a capture failed; every step is called directly from then on

    def run(self, captions: Tensor, views: Tensor, length: int) -> Tensor:
        """Run one step on the captions and views that `StepInputs.send` returned.

        No caption may have more than `length` targets. Returns the loss, on the device.
        """
        shape = (len(captions), length)
        self._forget_if_moved()
        captured = self._captured.get(shape)
        if captured is None:
            self._calls[shape] = self._calls.get(shape, 0) + 1
            if self.failure or self._calls[shape] <= _DIRECT_STEPS:
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
        """Drop all graphs. Dropping some would take cuBLAS's workspace from the others."""
        if self._captured and self._stream is not None:
            torch.cuda.synchronize(self._stream.device)  # a graph may still be running
        self._captured.clear()
        self._pool = None  # no capture can use a pool whose graphs are gone

    def _capture(self, captions: Tensor, views: Tensor, length: int) -> _Captured | None:
        """Capture a step. Returns None and sets `failure` if that is not possible."""
        usual_stream: torch.cuda.Stream | None = None
        try:
            graph = torch.cuda.CUDAGraph()
            usual_stream = torch.cuda.current_stream(captions.device)
            self._stream = self._stream or torch.cuda.Stream(captions.device)
            # thread_local: calls that other threads make to CUDA meanwhile do no harm.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                loss = self._step(captions, views, length)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The context is the error that broke the capture off; the error itself only says that
            # the capture could not end.
            self.failure = str(error.__context__ or error).splitlines()[0]
            _log.warning("no CUDA graphs (%s): training goes on without them, slower", self.failure)
            self._forget()
            if usual_stream is not None:
                _recover_from_failed_capture(usual_stream)
            return None
        self._pool = self._pool or graph.pool()
        return _Captured(graph, loss)


def _recover_from_failed_capture(usual_stream: torch.cuda.Stream) -> None:
    """Make the usual stream current and the random number generator usable again.

    After a failed capture PyTorch stays on the capture's stream, and its generator refuses to draw
    outside of a capture until another capture has ended well.
    """
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=usual_stream.device)
    torch.cuda.set_stream(usual_stream)
