"""Random weights from a fixed seed, with which a network behaves as a trained one does."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.encoder.fusion.batchnorm import BATCHNORMS
from pipeline.encoder.networks.headless import Headless
from pipeline.encoder.networks.torchvision_models import classifiers
from pipeline.encoder.networks.torchvision_networks import headless_network
from pipeline.encoder.networks.weights_sha256 import weights_sha256

_RANDOM_SEED = 0
_CALIBRATION_IMAGES = 8


def random_network(name: str) -> tuple[Headless, str]:
    """(network, hash): seeded weights, BatchNorm statistics measured on seeded images.

    With BatchNorm's initial statistics, the activations of a deep ResNet grow beyond float16 (5e7
    at depth 152). Measured statistics may differ in the last bit between machines, so the hash
    covers the seeded weights alone. Residual branches have the scale that training gives them; see
    `scale_branches`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        headless = headless_network(name, device="cpu")
        network = headless.network
        scaled = scale_branches(network)
        sha256 = weights_sha256(network.state_dict())
        # ResNets, and networks without residual branches, have had these statistics since 0.1.0. No
        # hash covers them.
        known = isinstance(network, classifiers().ResNet) or not scaled
        _measure(network, _coarse_noise() if known else _noise_of_all_sizes())
    return headless, sha256


def _coarse_noise() -> Tensor:
    """(B, 3, 224, 224), like photos in that neighbouring pixels are alike."""
    return _enlarged(torch.randn(_CALIBRATION_IMAGES, 3, 14, 14))


def _enlarged(noise: Tensor) -> Tensor:
    return nn.functional.interpolate(noise, (224, 224), mode="bicubic")


def _noise_of_all_sizes() -> Tensor:
    """(B, 3, 224, 224), like photos also in that details of all sizes have the same variance, and
    are greyish.

    Without the small ones, filters that see only these would seem to give hardly anything, and
    BatchNorm would enlarge what they give of photos a hundredfold.
    """
    sizes = (7, 14, 28, 56, 112, 224)
    noise = torch.zeros(_CALIBRATION_IMAGES, 3, 224, 224)
    for size in sizes:
        grey = torch.randn(_CALIBRATION_IMAGES, 1, size, size)
        layer = 0.9 * grey + 0.44 * torch.randn(_CALIBRATION_IMAGES, 3, size, size)
        noise += _enlarged(layer)
    return noise / math.sqrt(len(sizes))


def _measure(network: nn.Module, images: Tensor) -> None:
    """Give each BatchNorm the statistics of these images. Everything else computes as in use: with
    dropout and stochastic depth, the statistics would be those of another network."""
    batchnorms = [module for module in network.modules() if isinstance(module, BATCHNORMS)]
    momenta = [module.momentum for module in batchnorms]
    network.eval()
    for module in batchnorms:
        module.train().momentum = None  # the plain average over all passes, here over one
    if batchnorms:
        with torch.no_grad():
            network(images)
    for module, momentum in zip(batchnorms, momenta, strict=True):
        module.eval().momentum = momentum


def scale_branches(network: nn.Module) -> bool:
    """Let each of a network's L residual branches add 1/L of the variance of the blocks' input.

    De and Smith (2020) find that in trained residual networks the branches are about 1/√L as large
    as the shortcuts. With branches of full size a ResNet-152 is chaotic: rounding its input to
    bfloat16 alone turns the features of some photos by a tenth, which no trained network does.
    Returns whether there are such branches.
    """
    lasts = [last for block in network.modules() if (last := _end_of_branch(block)) is not None]
    for batchnorm in lasts:
        nn.init.constant_(batchnorm.weight, len(lasts) ** -0.5)
    return bool(lasts)


def _end_of_branch(block: nn.Module) -> nn.BatchNorm2d | None:
    """The last BatchNorm of the branch of a residual block, if this is one; its result is added to
    the shortcut. Blocks that end in another way (transformers) are tame as torchvision draws them.
    """
    models = classifiers()
    last: nn.Module | None = None
    if isinstance(block, models.resnet.Bottleneck):
        last = block.bn3
    elif isinstance(block, models.resnet.BasicBlock):
        last = block.bn2
    elif isinstance(block, models.regnet.ResBottleneckBlock):
        last = _last_batchnorm(block.f)
    elif getattr(block, "use_res_connect", False) or getattr(
        block, "apply_residual", False
    ):  # MobileNets and EfficientNets
        last = _last_batchnorm(block)
    return last if isinstance(last, nn.BatchNorm2d) else None


def _last_batchnorm(module: nn.Module) -> nn.BatchNorm2d | None:
    found = [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
    return found[-1] if found else None
