"""CUDA graphs: a function of fixed shapes is launched as a whole, not kernel by kernel.

A ResNet-152 has some three hundred kernels. Launching them one by one from Python takes longer than
the GPU needs to compute a small batch in low precision.
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
    """Calls `function` directly at the first input of a shape, and as a captured graph afterwards.

    function: one tensor to one tensor, on a GPU, without synchronization or data-dependent shapes.
    Its result may depend on nothing but its input.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._seen: set[tuple[int, ...]] = set()
        self._captured: dict[tuple[int, ...], _Captured] = {}
        self._copies = torch.cuda.Stream(device)  # so that a copy overlaps with the work before it
        # A stream for these graphs alone. When it is freed, PyTorch frees the workspaces that its
        # libraries keep for it.
        self._captures = torch.cuda.Stream(device)
        self.failure = ""  # why no graph could be captured; then everything is called directly

    def __call__(self, inputs: Tensor) -> Tensor:
        """The function's result for `inputs`: a new tensor on the GPU.

        inputs: on any device. The work is queued on the current stream. Pinned inputs are copied
        without waiting, so they must not change until the result has been computed.
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
            captured.inputs.copy_(on_device)  # on the stream of the last replay, so after it
            captured.graph.replay()
            return captured.outputs.clone()

    def clear(self) -> None:
        """Free the memory that the graphs hold."""
        self._captured.clear()
        self._seen.clear()

    def _copied(self, inputs: Tensor) -> Tensor:
        if inputs.device == self._device:
            return inputs
        with torch.cuda.stream(self._copies):
            copied = inputs.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream()
        current.wait_stream(self._copies)
        copied.record_stream(current)  # else the other stream might reuse its memory too early
        return copied

    def _capture(self, example: Tensor) -> _Captured | None:
        """Capture a graph. If that fails, sets `failure` and returns None.

        Raises OutOfMemoryError if the memory is too small.
        """
        inputs = example.clone()
        side, current = self._captures, torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries allocate workspaces here, before the capture
            for _ in range(_WARM_UP_RUNS):
                self._function(inputs)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local, so that calls of CUDA in other threads do not disturb the capture.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                outputs = self._function(inputs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The context is the error in the function; the error itself only says that the capture
            # could not be ended.
            self.failure = str(error.__context__ or error).splitlines()[0]
            torch.cuda.set_stream(current)  # PyTorch leaves the stream of the capture current
            return None
        return _Captured(graph, inputs, outputs)
