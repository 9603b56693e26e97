"""Training steps as CUDA graphs: when they are captured and dropped, and that losses agree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import MakeCache
from train.captions.caption_set import caption_set
from train.captions.vocabulary import build_vocabulary
from train.config import Recipe
from train.fit.trainer import Trainer
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.step.cuda.graphs import GraphedSteps, graph_length
from train.step.cuda.step_inputs import StepInputs


class StubGraph:
    """Stands in for a CUDA graph, and logs when it is captured and replayed."""

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
    steps.run(chosen, chosen, 4)  # another length
    assert log[5:] == ["step"]
    generation[0] += 1  # as when a longer batch moves the buffers
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
    """Dropping some graphs of a stream would take cuBLAS's workspace from the others."""
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
    assert log[-1] == "usual stream True"  # the step ran directly, not as a graph


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_random_numbers_can_be_drawn_after_a_failed_capture() -> None:
    def step(chosen: Tensor, views: Tensor, length: int) -> Tensor:
        drawn = torch.rand(4, device="cuda")
        return torch.tensor(float(drawn.sum()))  # waits for the device, which a capture forbids

    steps, chosen = GraphedSteps(step, lambda: 0), torch.tensor([0], device="cuda")
    usual = torch.cuda.current_stream()
    losses = {float(steps.run(chosen, chosen, 3)) for _ in range(6)}
    assert steps.failure
    assert len(losses) == 6
    assert torch.cuda.current_stream() == usual


def test_step_inputs_arrive_in_the_order_of_the_steps() -> None:
    inputs = StepInputs(4, torch.device("cpu"))
    for n in range(100):  # more steps than slots
        chosen = np.arange(n, n + 3 + n % 2)
        captions, views = inputs.send(
            chosen, chosen % 2, tokens=n, rate=0.5 * n, average_weight=0.25
        )
        assert captions.tolist() == chosen.tolist()
        assert views.tolist() == (chosen % 2).tolist()
        assert inputs.numbers[:3].tolist() == [n, 0.5 * n, 0.25]
    captions, views = inputs.send(np.array([5]), 1, tokens=1, rate=0, average_weight=0)
    assert (captions.tolist(), views.tolist()) == ([5], [1])


def test_a_batch_larger_than_the_data_takes_no_memory(make_cache: MakeCache) -> None:
    """At 16 bytes a caption and slot, a batch of 10^12 captions would not fit anywhere."""
    cache = make_cache([["a dog"]] * 5)
    vocabulary = build_vocabulary(cache.captions, 1)
    decoder = CaptionDecoder(DecoderConfig(8, len(vocabulary), 8, 8))
    captions = caption_set(cache, vocabulary, device=torch.device("cpu"), max_length=9)
    trainer = Trainer(decoder, captions, Recipe(batch_size=10**12), seed=0)
    assert [result.captions for result in trainer.epoch(0)] == [5]


def test_long_captions_of_similar_length_share_a_graph() -> None:
    assert [graph_length(n) for n in range(1, 21)] == list(range(1, 21))
    assert [graph_length(n) for n in (21, 24, 25, 51)] == [24, 24, 32, 56]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_graphed_run_on_a_gpu_follows_an_eager_one(make_cache: MakeCache, name: str) -> None:
    """With captions of different lengths, dropout, averaging, and validation on longer captions."""
    random = np.random.default_rng(0)
    words = [f"w{n}" for n in range(12)]
    texts = [
        [" ".join(random.choice(words, random.integers(1, 9))) for _ in range(3)] for _ in range(64)
    ]
    texts[-4:] = [[" ".join(random.choice(words, 20))] for _ in range(4)]
    cache = make_cache(texts)
    vocabulary = build_vocabulary(cache.captions, 1)
    device = torch.device(name)
    recipe = Recipe(
        embedding_size=16, hidden_size=32, batch_size=16, epochs=6, learning_rate=0.01,
        dropout=0.2, feature_dropout=0.2, average_decay=0.9, label_smoothing=0.1,
        photo_every_step=True, tie_embeddings=True, decay="cosine",
    )  # fmt: skip
    losses: dict[bool, list[float]] = {}
    for graphed in (True, False):
        torch.manual_seed(0)
        model = CaptionDecoder(
            DecoderConfig(
                8, len(vocabulary), 16, 32, dropout=0.2, feature_dropout=0.2,
                photo_every_step=True, tie_embeddings=True,
            )
        ).to(device)  # fmt: skip
        training, longer = (
            caption_set(cache, vocabulary, rows=np.array(rows), device=device, max_length=50)
            for rows in (range(60), range(60, 64))
        )
        trainer = Trainer(model, training, recipe, seed=0, precision="float32")
        assert trainer.graphs is not None
        if not graphed:
            trainer.graphs.failure = "to compare"
        losses[graphed] = []
        for epoch in range(6):
            losses[graphed] += [float(step.loss) for step in trainer.epoch(epoch)]
            with trainer.evaluation_weights():
                losses[graphed].append(trainer.validation_loss(longer))
    np.testing.assert_allclose(losses[True], losses[False], atol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graphed_run_on_a_gpu_follows_the_plain_one(
    make_cache: MakeCache,
) -> None:
    cache = make_cache([[f"w{n % 7} w{n % 5} w{n % 3}" for _ in range(3)] for n in range(64)])
    vocabulary = build_vocabulary(cache.captions, 1)
    device = torch.device("cuda")
    recipe = Recipe(embedding_size=16, hidden_size=32, batch_size=16, epochs=10, learning_rate=0.01)
    losses = {}
    for plain in (True, False):
        torch.manual_seed(0)
        model = CaptionDecoder(DecoderConfig(8, len(vocabulary), 16, 32)).to(device)
        captions = caption_set(cache, vocabulary, device=device, max_length=50)
        trainer = Trainer(model, captions, recipe, seed=0, plain=plain, precision="float32")
        losses[plain] = [float(s.loss) for epoch in range(10) for s in trainer.epoch(epoch)]
    np.testing.assert_allclose(losses[True], losses[False], atol=0.02)
