"""Fused convolutions compared with the network as torchvision builds it."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torchvision import models

from pipeline.encoder.fusion.batchnorm import fold_batchnorm
from pipeline.encoder.fusion.fused_convolutions import (
    _CudnnConvolution,
    _MaxPool3,
    _OneDnnConvolution,
    _replace_max_pools,
    fuse_convolutions,
)
from pipeline.encoder.weights import load_backbone

CPU = torch.device("cpu")


def images(count: int = 2, size: int = 64) -> torch.Tensor:
    """Coarse noise, like that on which BatchNorm statistics of random weights are measured."""
    coarse = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, (size, size), mode="bicubic")


def distance(features: torch.Tensor, expected: torch.Tensor) -> float:
    return float((features - expected).norm() / expected.norm())


def fused_on_cpu(network: nn.Module, example: torch.Tensor) -> nn.Module:
    with torch.inference_mode():
        return fuse_convolutions(
            fold_batchnorm(network), CPU, torch.float32, typical_batch=len(example)
        )


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])  # in the second not all is folded
def test_a_network_in_bfloat16_leaves_its_original_in_float32(name: str) -> None:
    network = load_backbone(name, "random").network
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    fuse_convolutions(fold_batchnorm(network), CPU, torch.bfloat16, typical_batch=2)
    for key, tensor in network.state_dict().items():
        assert tensor.dtype is before[key].dtype
        assert torch.equal(tensor, before[key])
        assert tensor.stride() == before[key].stride()


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "mobilenet_v2",
        "mobilenet_v3_small",
        "shufflenet_v2_x0_5",
        "efficientnet_b0",
        "densenet121",
        "squeezenet1_0",  # no linear layer: only here to show that any convolution fuses
    ],
)
def test_fused_networks_compute_what_plain_ones_do(name: str) -> None:
    if name == "squeezenet1_0":
        torch.manual_seed(0)
        network = models.get_model(name, weights=None).eval().requires_grad_(False)
    else:
        network = load_backbone(name, "random").network
    pixels = images()
    with torch.inference_mode():
        expected = network(pixels)
        fused = fused_on_cpu(network, pixels)
        for batch in (pixels, images(5), images(3, 96)):  # any shape, whatever the weights' layout
            assert distance(fused(batch), network(batch)) < 1e-4
        assert torch.equal(network(pixels), expected)  # the original is as it was
    assert sum(isinstance(m, nn.Conv2d) for m in fused.modules()) == 0
    assert any(isinstance(m, _OneDnnConvolution) for m in fused.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])  # the second has groups
@pytest.mark.parametrize("counts", [(1, 3, 1), (3, 1, 3)], ids=str)
@pytest.mark.parametrize("converts", [True, False])
def test_a_photo_alone_has_weights_in_a_layout_of_its_own(
    name: str, counts: tuple[int, ...], converts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError

    if not converts:
        monkeypatch.setattr(torch.Tensor, "to_dense", fails)
    network = load_backbone(name, "random").network
    fused = fused_on_cpu(network, images(3))
    with torch.inference_mode():
        for count in counts:
            assert distance(fused(images(count)), network(images(count))) < 1e-4
    convolutions = [m for m in fused.modules() if isinstance(m, _OneDnnConvolution)]
    assert convolutions
    for convolution in convolutions:
        assert convolution.layouts.keys() == {True, False}
        assert convolution.weight is None
        alone, together = convolution.layouts[True], convolution.layouts[False]
        assert not alone.is_mkldnn or (alone is not together) == converts


def test_a_resnet_has_no_separate_sum_or_activation_left() -> None:
    fused = fused_on_cpu(load_backbone("resnet50", "random").network, images())
    assert isinstance(fused, fx.GraphModule)
    modules = dict(fused.named_modules())
    kinds = [
        type(modules[str(node.target)]).__name__ if node.op == "call_module" else node.op
        for node in fused.graph.nodes
    ]
    # 53 convolutions; the rest is input, max-pool, average-pool, flatten, the missing head, output.
    assert kinds.count("_OneDnnConvolution") == 53
    assert "ReLU" not in kinds
    assert kinds.count("call_function") == 1
    blocks = [m for m in modules.values() if isinstance(m, _OneDnnConvolution) and m.in_place]
    assert len(blocks) == 16  # one sum a block, each over a tensor nobody else needs


class Awkward(nn.Module):
    """Sums and shared results that must not be fused in place, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.c = nn.Conv2d(8, 8, 3, padding="same")
        self.d = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.e = nn.Conv2d(8, 8, 1)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        b = self.relu(self.b(a) + a)  # `a` is read again below
        c = torch.relu(self.c(b)) + a
        d = self.relu(self.d(c))
        twice = self.e(d)
        doubled = twice + twice
        scaled = self.e(doubled) + 1.5
        clamped = torch.add(self.e(scaled), d, alpha=2)
        out: torch.Tensor = torch.nn.functional.relu6(self.e(clamped)) + self.e(d)
        return out.mean((2, 3))


def test_awkward_sums_stay_right() -> None:
    torch.manual_seed(0)
    network = Awkward().eval().requires_grad_(False)
    with torch.inference_mode():
        fused = fused_on_cpu(network, images())
        for _ in range(2):  # a second run must not find the first one's leftovers
            torch.testing.assert_close(fused(images()), network(images()), rtol=1e-4, atol=1e-4)


class OverItself(nn.Module):
    """Convolutions whose results are added to what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.deep, self.turned = (nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2))
        self.nothing = nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.nothing(self.deep(x))
        x = self.stem(x[:, :3])
        x = self.turned(x.transpose(2, 3)) + x
        return x.mean((2, 3))


def test_a_convolution_does_not_overwrite_what_it_reads() -> None:
    torch.manual_seed(0)
    network = OverItself().eval().requires_grad_(False)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        fused = fused_on_cpu(network, pixels)
        assert any(isinstance(module, _OneDnnConvolution) for module in fused.modules())
        torch.testing.assert_close(fused(pixels), network(pixels), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_traced_runs_as_it_is() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.conv(x)
            return y.mean((2, 3)) if bool(y.sum() > 0) else y.amax((2, 3))

    network = Branches().eval().requires_grad_(False)
    fused = fused_on_cpu(network, images())
    torch.testing.assert_close(fused(images()), network(images()))


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 2), (12, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_max_pooling_is_torchs(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(3, 16, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(_MaxPool3()(x), nn.MaxPool2d(3, 2, 1)(x))
    assert _MaxPool3()(x).is_contiguous(memory_format=torch.channels_last)


def test_only_max_pools_of_that_kind_are_replaced() -> None:
    network = nn.Sequential(
        nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2), nn.MaxPool2d((3, 3), (2, 2), (1, 1)),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(2),
    )  # fmt: skip
    _replace_max_pools(network)
    assert [isinstance(pool, _MaxPool3) for pool in network] == [True, False, True, False, False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_networks_agree_on_a_gpu(dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    network = load_backbone("resnet50", "random").network
    pixels = images(4, 224)
    with torch.inference_mode():
        expected = network(pixels)
        fused = fuse_convolutions(fold_batchnorm(network), device, dtype, typical_batch=4)
        by_cudnn = any(isinstance(m, _CudnnConvolution) for m in fused.modules())
        assert by_cudnn == (dtype is not torch.float32)
        batch = pixels.to(device, dtype).contiguous(memory_format=torch.channels_last)
        features = fused(batch).float().cpu()
    assert float(torch.cosine_similarity(features, expected).min()) > 0.999
