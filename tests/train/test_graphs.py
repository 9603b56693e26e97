"""Training steps as CUDA graphs, without a GPU: when they are captured, replayed and dropped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from train.step.cuda.graphs import GraphedSteps, graph_length
from train.step.cuda.step_inputs import StepInputs


class StubGraph:
    """Instead of a CUDA graph: says when it is captured and replayed."""

    log: list[str]

    def __init__(self) -> None:
        self.log.append("capture")

    def replay(self) -> None:
        self.log.append("replay")


def test_graphs_are_forgotten_when_their_buffers_move(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    generation = [0]
    monkeypatch.setattr(StubGraph, "log", log, raising=False)

    def step(chosen: Tensor, views: Tensor, length: int) -> Tensor:
        log.append("step")
        return torch.zeros(())

    steps = GraphedSteps(step, lambda: generation[0])
    monkeypatch.setattr(
        steps, "_capture", lambda *_: SimpleNamespace(graph=StubGraph(), loss=torch.zeros(()))
    )
    chosen = torch.tensor([0, 1])
    for _ in range(4):
        steps.run(chosen, chosen, 3)
    assert log == ["step", "step", "capture", "replay", "replay"]
    steps.run(chosen, chosen, 4)  # of another length
    assert log[5:] == ["step"]
    generation[0] += 1  # as a longer batch does
    steps.run(chosen, chosen, 3)
    assert log[6:] == ["capture", "replay"]


def test_steps_go_on_directly_where_no_graph_can_be_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NoGraph:
        def __init__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", NoGraph)
    steps = GraphedSteps(lambda chosen, views, length: torch.tensor(float(length)), lambda: 0)
    chosen = torch.tensor([0])
    assert [float(steps.run(chosen, chosen, 7)) for _ in range(5)] == [7] * 5
    assert steps.failure == "operation not permitted when stream is capturing"


def test_graphs_are_captured_on_one_stream_and_dropped_together_when_one_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Dropping some of a stream's graphs would take cuBLAS's workspace from the others."""
    log: list[str] = []
    seen: list[tuple[object, object]] = []

    class Graph(StubGraph):
        def pool(self) -> str:
            return "pool"

    @contextlib.contextmanager
    def capture(graph: Graph, **options: object) -> Iterator[None]:
        if not options:
            log.append("recover")
            yield
            return
        seen.append((options["stream"], options["pool"]))
        try:
            yield
        finally:
            if len(seen) == 3:
                raise RuntimeError("cannot end this capture")

    monkeypatch.setattr(StubGraph, "log", log, raising=False)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    usual = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: usual)
    monkeypatch.setattr(
        torch.cuda, "set_stream", lambda stream: log.append(f"usual stream {stream is usual}")
    )

    def step(chosen: Tensor, views: Tensor, length: int) -> Tensor:
        if length == 3 and len(seen) == 3 and not steps.failure:
            raise RuntimeError("capture is off")
        return torch.tensor(float(length))

    steps = GraphedSteps(step, lambda: 0)
    chosen = torch.tensor([0])
    for length in (1, 2, 3):
        assert [float(steps.run(chosen, chosen, length)) for _ in range(4)] == [length] * 4
    assert seen == [(seen[0][0], None), (seen[0][0], "pool"), (seen[0][0], "pool")]
    assert steps.failure == "capture is off"
    assert "capture is off" in caplog.text
    assert log[-5:] == ["capture", "wait", "capture", "recover", "usual stream True"]
    steps.run(chosen, chosen, 1)
    assert log[-1] == "usual stream True"  # directly, not by a graph


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_random_numbers_are_drawn_on_after_a_capture_that_failed() -> None:
    def step(chosen: Tensor, views: Tensor, length: int) -> Tensor:
        drawn = torch.rand(4, device="cuda")
        return torch.tensor(float(drawn.sum()))  # waits, which a capture forbids

    steps, chosen = GraphedSteps(step, lambda: 0), torch.tensor([0], device="cuda")
    usual = torch.cuda.current_stream()
    losses = {float(steps.run(chosen, chosen, 3)) for _ in range(6)}
    assert steps.failure
    assert len(losses) == 6
    assert torch.cuda.current_stream() == usual


def test_step_inputs_bring_everything_in_the_order_of_the_steps() -> None:
    inputs = StepInputs(4, torch.device("cpu"))
    for n in range(100):  # more than there are slots
        chosen = np.arange(n, n + 3 + n % 2)
        captions, views = inputs.send(
            chosen, chosen % 2, tokens=n, rate=0.5 * n, average_weight=0.25
        )
        assert captions.tolist() == chosen.tolist()
        assert views.tolist() == (chosen % 2).tolist()
        assert inputs.numbers[:3].tolist() == [n, 0.5 * n, 0.25]
    captions, views = inputs.send(np.array([5]), 1, tokens=1, rate=0, average_weight=0)
    assert (captions.tolist(), views.tolist()) == ([5], [1])


def test_graphs_are_shared_by_the_few_long_lengths() -> None:
    assert [graph_length(n) for n in range(1, 21)] == list(range(1, 21))
    assert [graph_length(n) for n in (21, 24, 25, 51)] == [24, 24, 32, 56]
