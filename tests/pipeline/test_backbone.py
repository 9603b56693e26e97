from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.transforms.functional import normalize

from pipeline.encoder.encoder import Encoder
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.random_weights import scale_branches
from pipeline.encoder.networks.torchvision_networks import headless_network
from pipeline.encoder.weights import load_backbone
from tests.pipeline.test_encoder import CPU, random_pixels

# The smallest of families, with features and size of images. ViTs are in test_torchvision_weights;
# scripts/compare_backbones.py compares all networks, also those that are large for a test.
FAMILIES = [
    ("convnext_tiny", 768, 64),
    ("densenet121", 1024, 64),
    ("efficientnet_b0", 1280, 64),
    ("googlenet", 1024, 64),
    ("inception_v3", 2048, 96),
    ("mnasnet0_5", 1280, 64),
    ("mobilenet_v2", 1280, 64),
    ("mobilenet_v3_small", 1024, 64),
    ("regnet_x_400mf", 400, 64),
    ("regnet_y_400mf", 440, 64),  # cannot be built on the meta device
    ("resnet18", 512, 64),
    ("shufflenet_v2_x0_5", 1024, 64),
    ("squeezenet1_1", 512, 64),  # its head is a convolution
    ("swin_v2_t", 768, 64),
]
# What torchvision's constructors set when they are given published weights.
WITH_WEIGHTS = {
    name: {"transform_input": True, "init_weights": True} for name in ("googlenet", "inception_v3")
}


@pytest.mark.parametrize(("name", "feature_dim", "size"), FAMILIES)
def test_any_classifier_loses_its_head_and_keeps_its_features(
    name: str, feature_dim: int, size: int, tmp_path: Path
) -> None:
    """The features are the inputs of the last layer of torchvision's own network, which sees the
    pixels as torchvision's own preset normalizes them.
    """
    torch.manual_seed(1)
    whole = models.get_model(name, weights=None, **WITH_WEIGHTS.get(name, {})).eval()
    scale_branches(whole)  # otherwise rounding alone changes an EfficientNet's features
    batchnorms = [each for each in whole.modules() if isinstance(each, nn.BatchNorm2d)]
    for batchnorm in batchnorms:  # without statistics, features are next to nothing or overflow
        batchnorm.train().momentum = None
    with torch.no_grad():
        whole(random_pixels(4, size) / 128 - 1)
    whole.eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    backbone = load_backbone(name, str(tmp_path / "w.pth"))
    assert backbone.feature_dim == feature_dim
    encoder = Encoder(backbone, device=CPU, precision="float32", image_size=size)
    pixels = random_pixels(2, size)
    seen: list[torch.Tensor] = []
    last = [module for module in whole.modules() if isinstance(module, nn.Linear)][-1:]
    for layer in last or [whole.classifier]:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    preset = models.get_model_weights(name).DEFAULT.transforms()
    with torch.no_grad():
        whole(normalize(pixels / 255, preset.mean, preset.std))
    expected = seen[0] if seen[0].dim() == 2 else seen[0].mean((2, 3))
    largest = float(expected.abs().max())
    assert largest > 0.1
    features = encoder.encode(pixels)
    assert features.shape == (2, feature_dim)
    assert features.dtype == torch.float16
    torch.testing.assert_close(features.float(), expected, rtol=2e-3, atol=2e-3 * largest)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("r3d_18", "videos"),
        ("fasterrcnn_resnet50_fpn", "detection"),
        ("fcn_resnet50", "segmentation"),
        ("raft_small", "optical flow"),
        ("quantized_resnet18", "integers of 8 bits"),
    ],
)
def test_networks_of_torchvision_that_are_no_classifiers_are_one_line(name: str, kind: str) -> None:
    for weights in ("random", "DEFAULT", "w.pth"):
        with pytest.raises(EncoderError) as caught:
            load_backbone(name, weights)
        assert str(caught.value) == (
            f"{name} is a network of torchvision for {kind}, not a classifier of photos; "
            "`cap backbones` lists those"
        )


def test_backbones_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(EncoderError, match="no backbone 'resnet15'"):
        load_backbone("resnet15", "random")
    backbone = load_backbone("vit_b_32", "random")
    with pytest.raises(EncoderError, match="cannot take 64×64"):
        backbone.check_image_size(64)
    encoder = Encoder(backbone, device=CPU, precision="float32", image_size=64)
    with pytest.raises(EncoderError, match="cannot take 64×64"):
        encoder.encode(random_pixels(1, 64))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "resnet18"])
def test_building_a_backbone_neither_warns_nor_filters_warnings(
    name: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(warnings, "catch_warnings", None)  # not safe with threads
    headless_network(name, "meta")
    assert [str(warning.message) for warning in recwarn] == []
