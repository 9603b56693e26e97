"""Shapes computed here are those that PyTorch computes."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest
import torch
from torch import nn

from pipeline.encoder.networks.torchvision_networks import headless_network
from pipeline.encoder.shapes import meta_twin, run_on_meta
from pipeline.encoder.weights import load_backbone
from tests.conftest import ROOT

HEAVY = (
    "sympy", "triton", "torch._dynamo", "torch.fx.experimental.symbolic_shapes",
    "torch.distributed.fsdp", "torch._meta_registrations",
)  # fmt: skip


def test_a_twin_has_shapes_and_no_numbers() -> None:
    network = load_backbone("resnet18", "random").network
    twin = meta_twin(network)
    assert {p.device.type for p in twin.parameters()} == {"meta"}
    assert twin(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 512)
    assert {p.device.type for p in network.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    list(product((1, 3, (5, 2)), (1, 2, (3, 1)), (0, (2, 1)), (1, 2), (1, 2))),
)
def test_convolutions(kernel: int, stride: int, padding: int, dilation: int, groups: int) -> None:
    layer = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups)
    for size in ((9, 9), (10, 13), (17, 9)):
        x = torch.zeros(2, 4, *size)
        assert run_on_meta(layer, x.shape).shape == layer(x).shape


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3, padding="same"),
        nn.Conv2d(3, 5, 3, padding=2, padding_mode="reflect"),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((None, 3)),
        nn.BatchNorm2d(3),
        nn.LayerNorm([11]),
        nn.ReLU(inplace=True),
        nn.GLU(1),  # has no simple rule
    ],
)
def test_other_layers(layer: nn.Module) -> None:
    channels = 4 if isinstance(layer, nn.GLU) else 3
    x = torch.zeros(2, channels, 11, 11)
    assert run_on_meta(layer.eval(), x.shape).shape == layer(x).shape


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(3, 5, 13), r"13×13 is larger than the 12 pixels"),
        (nn.Conv2d(3, 5, 3, dilation=6), r"3×3 is larger than the 12 pixels"),
        (nn.Conv2d(4, 5, 3), r"4 channels got \(2, 3, 12, 12\)"),
    ],
)
def test_what_is_impossible_is_refused_as_by_pytorch(layer: nn.Module, message: str) -> None:
    with pytest.raises(RuntimeError):
        layer(torch.zeros(2, 3, 12, 12))
    with pytest.raises(RuntimeError, match=message):
        run_on_meta(layer, (2, 3, 12, 12))


@pytest.mark.parametrize("name", ["densenet121", "convnext_tiny", "vit_b_32", "mobilenet_v3_small"])
def test_a_classifier_has_one_vector_for_each_photo(name: str) -> None:
    headless = headless_network(name, "meta")
    network, feature_dim = headless.network, headless.feature_dim
    assert run_on_meta(network.eval(), (2, 3, 224, 224)).shape == (2, feature_dim)


def test_shapes_are_computed_without_heavy_modules_and_with_them_where_needed() -> None:
    """In a fresh process, because modules stay imported."""
    code = (
        "import sys\n"
        "from train.torch_import import import_torch\n"
        "import_torch()\n"
        "from torch import nn\n"
        "from pipeline.encoder.networks.torchvision_networks import headless_network\n"
        "from pipeline.encoder.shapes import run_on_meta\n"
        "for name in ('resnet50', 'vgg11_bn', 'mobilenet_v2', 'vit_b_32', 'efficientnet_b0'):\n"
        "    headless = headless_network(name, 'meta')\n"
        "    network, feature_dim = headless.network, headless.feature_dim\n"
        "    assert run_on_meta(network.eval(), (2, 3, 224, 224)).shape == (2, feature_dim)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
        "print(tuple(run_on_meta(nn.LocalResponseNorm(3), (2, 3, 8, 8)).shape))\n"
        "print(tuple(run_on_meta(nn.Softshrink(), (2, 3, 8, 8)).shape))\n"
        "print(tuple(run_on_meta(nn.GroupNorm(3, 3), (2, 3, 8, 8)).shape))\n"
        "print('torch._meta_registrations' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    shape = "(2, 3, 8, 8)"
    assert result.stdout.splitlines() == ["[]", shape, shape, shape, "True"]
