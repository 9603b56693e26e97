from __future__ import annotations

import torch
from torch import nn

from pipeline.encoder.batchnorm import fold_batchnorm, has_batchnorm
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
