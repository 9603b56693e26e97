from __future__ import annotations

import threading

import torch
from torch import fx, nn

from pipeline.encoder.fusion.batchnorm import fold_batchnorm, has_batchnorm
from pipeline.encoder.precision import _encode_on_cpu
from pipeline.encoder.weights import load_backbone
from tests.pipeline.test_fused_convolutions import images


def test_folding_keeps_the_network_and_leaves_the_original_alone() -> None:
    network = load_backbone("resnet18", "random").network
    folded = fold_batchnorm(network)
    assert not has_batchnorm(folded)
    assert has_batchnorm(network)
    torch.testing.assert_close(folded(images()), network(images()), rtol=1e-4, atol=1e-4)


class Shared(nn.Module):
    """One convolution before two BatchNorms, and one whose result is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.first, self.second, self.last = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(self.a(x)) + self.second(self.a(x))
        z = self.b(y)
        out: torch.Tensor = self.last(z) + z
        return out


def test_shared_convolutions_are_folded_for_each_call_or_not_at_all() -> None:
    torch.manual_seed(0)
    network = Shared()
    with torch.no_grad():
        network(3 + images())  # measures different statistics for each BatchNorm
        nn.init.normal_(network.second.weight)
        network.eval()
        folded = fold_batchnorm(network)
        torch.testing.assert_close(folded(images()), network(images()), rtol=1e-4, atol=1e-4)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules()) == 1


def test_a_network_is_not_traced_while_another_thread_runs_one() -> None:
    """torch.fx changes how the modules of all threads are called."""
    backbone = load_backbone("resnet18", "random")
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    errors: list[BaseException] = []
    stop = threading.Event()

    def run() -> None:
        try:
            while not stop.is_set():
                _encode_on_cpu(backbone, pixels)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(20):
        assert isinstance(fold_batchnorm(backbone.network), fx.GraphModule)
    stop.set()
    thread.join()
    assert not errors
