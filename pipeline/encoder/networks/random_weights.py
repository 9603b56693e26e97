"""Random weights from a fixed seed, with which a network behaves as a trained one does."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.encoder.fusion.batchnorm import BATCHNORMS, has_batchnorm
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
    `_scale_branches`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        headless = headless_network(name, device="cpu")
        network = headless.network
        _scale_branches(network)
        sha256 = weights_sha256(network.state_dict())
        # Coarse noise, enlarged: like photos, it has structure at every scale.
        coarse = torch.randn(_CALIBRATION_IMAGES, 3, 14, 14)
        images = nn.functional.interpolate(coarse, (224, 224), mode="bicubic")
        for module in network.modules():
            if isinstance(module, BATCHNORMS):
                module.momentum = None  # the plain average over all passes, here over one
        if has_batchnorm(network):
            with torch.no_grad():
                network.train()(images)
    return headless, sha256


def _scale_branches(network: nn.Module) -> None:
    """Let each of a ResNet's L residual branches add 1/L of the variance of the blocks' input.

    De and Smith (2020) find that in trained residual networks the branches are about 1/√L as large
    as the shortcuts. With branches of full size a ResNet-152 is chaotic: rounding its input to
    bfloat16 alone turns the features of some photos by a tenth, which no trained network does.
    """
    resnet = classifiers().resnet
    lasts = [
        block.bn3 if isinstance(block, resnet.Bottleneck) else block.bn2
        for block in network.modules()
        if isinstance(block, (resnet.BasicBlock, resnet.Bottleneck))
    ]
    for batchnorm in lasts:
        nn.init.constant_(batchnorm.weight, len(lasts) ** -0.5)
