"""A function of fixed shapes as one CUDA graph: the GPU runs on without waiting for Python.

A ResNet-152 is some three hundred kernels; launched one by one from Python they take longer than
the GPU needs for a small batch in low precision. A graph is launched once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_WARM_UP_RUNS = 3


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    outputs: Tensor


class CapturedGraphs:
    """Calls `function` directly for a shape seen once, and as a captured graph from then on.

    function: one tensor to one tensor, on a GPU, without synchronisation or data-dependent shapes;
    its result may depend on nothing else.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._seen: set[tuple[int, ...]] = set()
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._copies = torch.cuda.Stream(device)  # so that copies overlap with the work before
        # Of these graphs alone: dropping one frees what PyTorch's libraries keep for its stream.
        self._captures = torch.cuda.Stream(device)
        self.failure = ""  # why no graph could be captured; everything is called directly then

    def __call__(self, inputs: Tensor) -> Tensor:
        """inputs: on any device, copied without waiting where they are pinned: they must stay as
        they are until the result is there. The result is a tensor of its own on the GPU; the work
        is queued on the current stream.
        """
        shape = tuple(inputs.shape)
        with torch.cuda.device(self._device):
            on_device = self._copied(inputs)
            captured = self._captured.get(shape)
            if captured is None:
                if shape not in self._seen or self.failure:
                    self._seen.add(shape)
                    return self._function(on_device)
                captured = self._capture(on_device)
                if captured is None:
                    return self._function(on_device)
                self._captured[shape] = captured
            captured.inputs.copy_(on_device)  # after the last replay, which is on the same stream
            captured.graph.replay()
            return captured.outputs.clone()

    def clear(self) -> None:
        """Let go of the memory that the graphs hold."""
        self._captured.clear()
        self._seen.clear()

    def _copied(self, inputs: Tensor) -> Tensor:
        if inputs.device == self._device:
            return inputs
        with torch.cuda.stream(self._copies):
            copied = inputs.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream()
        current.wait_stream(self._copies)
        copied.record_stream(current)  # its memory is the other stream's
        return copied

    def _capture(self, example: Tensor) -> _Captured | None:
        """None, and `failure` says why, if it cannot be done. Raises where memory is too small."""
        inputs = example.clone()
        side, current = self._captures, torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries allocate their workspaces outside the graph
            for _ in range(_WARM_UP_RUNS):
                self._function(inputs)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: whatever other threads ask of CUDA meanwhile does not matter.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                outputs = self._function(inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # What broke it off, not that the capture then could not end.
            self.failure = str(error.__context__ or error).splitlines()[0]
            torch.cuda.set_stream(current)  # PyTorch leaves the capture's stream the current one
            return None
        return _Captured(graph, inputs, outputs)
