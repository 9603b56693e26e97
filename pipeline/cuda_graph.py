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

    def __call__(self, inputs: Tensor) -> Tensor:
        """inputs: on any device, copied without waiting where they are pinned. The result is a
        tensor of its own on the GPU.
        """
        shape = tuple(inputs.shape)
        captured = self._captured.get(shape)
        if captured is None:
            if shape not in self._seen:
                self._seen.add(shape)
                return self._function(inputs.to(self._device, non_blocking=True))
            with torch.cuda.device(self._device):
                captured = self._captured[shape] = self._capture(inputs)
        captured.inputs.copy_(inputs, non_blocking=True)
        captured.graph.replay()
        return captured.outputs.clone()

    def clear(self) -> None:
        """Let go of the memory that the graphs hold."""
        self._captured.clear()
        self._seen.clear()

    def _capture(self, example: Tensor) -> _Captured:
        inputs = example.to(self._device, copy=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their workspaces outside the graph
            for _ in range(_WARM_UP_RUNS):
                self._function(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._function(inputs)
        return _Captured(graph, inputs, outputs)
