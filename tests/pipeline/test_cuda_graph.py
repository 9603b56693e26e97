"""CUDA graphs compared with the same functions called directly. Needs a GPU."""

from __future__ import annotations

import pytest
import torch

from pipeline.encoder.cuda_graph import CapturedGraphs
from pipeline.encoder.encoder import Encoder, QueuedFeatures
from pipeline.encoder.weights import load_backbone
from tests.pipeline.test_encoder import random_pixels

pytestmark = pytest.mark.gpu


def test_a_graph_computes_what_the_function_does_from_pinned_and_other_memory() -> None:
    device = torch.device("cuda", 0)
    weight = torch.randn(64, 64, device=device)

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ weight).relu()

    with torch.inference_mode():
        graphs = CapturedGraphs(function, device)
        for seed in range(6):
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
            expected = function(x.to(device))
            for inputs in (x, x.pin_memory(), x.to(device)):
                assert torch.equal(graphs(inputs), expected)
    assert graphs.failure == ""


def test_results_are_their_own_and_pinned_buffers_can_be_used_again() -> None:
    """Batches are queued one after the other; a buffer is refilled once its features are there."""
    device = torch.device("cuda", 0)
    encoder = Encoder(
        load_backbone("resnet50", "random"), device=device, precision="float16", image_size=64
    )
    batches = random_pixels(8 * 12).view(12, 8, 3, 64, 64)
    expected = [encoder.encode(batch).cpu() for batch in batches]
    buffers = [torch.empty(8, 3, 64, 64, dtype=torch.uint8).pin_memory() for _ in range(2)]
    queued: list[QueuedFeatures] = []
    for number, batch in enumerate(batches):
        if number >= 2:
            assert torch.equal(torch.from_numpy(queued[number - 2].wait()), expected[number - 2])
        buffers[number % 2].copy_(batch)
        queued.append(encoder.queue(buffers[number % 2]))
    assert torch.equal(torch.from_numpy(queued[-1].wait()), expected[-1])
    assert torch.equal(torch.from_numpy(queued[0].wait()), expected[0])
    assert encoder.notices == []
