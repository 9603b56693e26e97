"""torchvision's classifiers that can be backbones, as a table, since importing torchvision takes
seconds: shells complete these names, and `cap backbones` lists them.

A classifier that is not in the table, of a later torchvision, works all the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Name, features, MB of the first published weights, their top-1 accuracy on ImageNet in percent,
# and the published weights without `IMAGENET1K_`. A test compares it with torchvision.
_TABLE = """
alexnet 4096 233 56.5 V1
convnext_base 1024 338 84.1 V1
convnext_large 1536 755 84.4 V1
convnext_small 768 192 83.6 V1
convnext_tiny 768 109 82.5 V1
densenet121 1024 31 74.4 V1
densenet161 2208 110 77.1 V1
densenet169 1664 55 75.6 V1
densenet201 1920 77 76.9 V1
efficientnet_b0 1280 20 77.7 V1
efficientnet_b1 1280 30 78.6 V1 V2
efficientnet_b2 1408 35 80.6 V1
efficientnet_b3 1536 47 82.0 V1
efficientnet_b4 1792 74 83.4 V1
efficientnet_b5 2048 117 83.4 V1
efficientnet_b6 2304 165 84.0 V1
efficientnet_b7 2560 255 84.1 V1
efficientnet_v2_l 1280 455 85.8 V1
efficientnet_v2_m 1280 208 85.1 V1
efficientnet_v2_s 1280 83 84.2 V1
googlenet 1024 50 69.8 V1
inception_v3 2048 104 77.3 V1
maxvit_t 512 119 83.7 V1
mnasnet0_5 1280 9 67.7 V1
mnasnet0_75 1280 12 71.2 V1
mnasnet1_0 1280 17 73.5 V1
mnasnet1_3 1280 24 76.5 V1
mobilenet_v2 1280 14 71.9 V1 V2
mobilenet_v3_large 1280 21 74.0 V1 V2
mobilenet_v3_small 1024 10 67.7 V1
regnet_x_16gf 2048 208 80.1 V1 V2
regnet_x_1_6gf 912 35 77.0 V1 V2
regnet_x_32gf 2520 412 80.6 V1 V2
regnet_x_3_2gf 1008 59 78.4 V1 V2
regnet_x_400mf 400 21 72.8 V1 V2
regnet_x_800mf 672 28 75.2 V1 V2
regnet_x_8gf 1920 151 79.3 V1 V2
regnet_y_128gf 7392 2462 88.2 SWAG_E2E_V1 SWAG_LINEAR_V1
regnet_y_16gf 3024 319 80.4 V1 V2 SWAG_E2E_V1 SWAG_LINEAR_V1
regnet_y_1_6gf 888 43 78.0 V1 V2
regnet_y_32gf 3712 554 80.9 V1 V2 SWAG_E2E_V1 SWAG_LINEAR_V1
regnet_y_3_2gf 1512 75 78.9 V1 V2
regnet_y_400mf 440 17 74.0 V1 V2
regnet_y_800mf 784 25 76.4 V1 V2
regnet_y_8gf 2016 151 80.0 V1 V2
resnet101 2048 171 77.4 V1 V2
resnet152 2048 230 78.3 V1 V2
resnet18 512 45 69.8 V1
resnet34 512 83 73.3 V1
resnet50 2048 98 76.1 V1 V2
resnext101_32x8d 2048 340 79.3 V1 V2
resnext101_64x4d 2048 319 83.2 V1
resnext50_32x4d 2048 96 77.6 V1 V2
shufflenet_v2_x0_5 1024 5 60.6 V1
shufflenet_v2_x1_0 1024 9 69.4 V1
shufflenet_v2_x1_5 1024 14 73.0 V1
shufflenet_v2_x2_0 2048 28 76.2 V1
squeezenet1_0 512 5 58.1 V1
squeezenet1_1 512 5 58.2 V1
swin_b 1024 335 83.6 V1
swin_s 768 190 83.2 V1
swin_t 768 108 81.5 V1
swin_v2_b 1024 336 84.1 V1
swin_v2_s 768 191 83.7 V1
swin_v2_t 768 109 82.1 V1
vgg11 4096 507 69.0 V1
vgg11_bn 4096 507 70.4 V1
vgg13 4096 508 69.9 V1
vgg13_bn 4096 508 71.6 V1
vgg16 4096 528 71.6 V1
vgg16_bn 4096 528 73.4 V1
vgg19 4096 548 72.4 V1
vgg19_bn 4096 548 74.2 V1
vit_b_16 768 330 81.1 V1 SWAG_E2E_V1 SWAG_LINEAR_V1
vit_b_32 768 337 75.9 V1
vit_h_14 1280 2417 88.6 SWAG_E2E_V1 SWAG_LINEAR_V1
vit_l_16 1024 1161 79.7 V1 SWAG_E2E_V1 SWAG_LINEAR_V1
vit_l_32 1024 1169 77.0 V1
wide_resnet101_2 2048 243 78.8 V1 V2
wide_resnet50_2 2048 132 78.5 V1 V2
"""


@dataclass(frozen=True)
class KnownBackbone:
    """What is published about a backbone."""

    name: str
    features: int  # numbers per photo and view
    size_mb: int  # of the download, 1e6 bytes
    top_1: float  # accuracy on ImageNet, in percent
    weights: tuple[str, ...]  # published; the size and the accuracy are those of the first

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "weights": list(self.weights)}


def _known(line: str) -> KnownBackbone:
    name, features, size_mb, top_1, *weights = line.split()
    names = tuple(f"IMAGENET1K_{each}" for each in weights)
    return KnownBackbone(name, int(features), int(size_mb), float(top_1), names)


KNOWN_BACKBONES = tuple(map(_known, _TABLE.strip().splitlines()))
BACKBONE_NAMES = tuple(backbone.name for backbone in KNOWN_BACKBONES)


def backbones_table(backbones: tuple[KnownBackbone, ...] = KNOWN_BACKBONES) -> str:
    """One line per backbone, after a header."""
    width = max(len(backbone.name) for backbone in backbones)
    header = f"{'backbone':<{width}}  features  download  top-1  weights"
    lines = (
        f"{each.name:<{width}}  {each.features:>8}  {each.size_mb:>5} MB  {each.top_1:>5.1f}  "
        f"{', '.join(each.weights)}"
        for each in backbones
    )
    return "\n".join([header, *lines])
