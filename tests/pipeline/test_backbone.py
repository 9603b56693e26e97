from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from pipeline.encoder.encoder import Encoder
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.torchvision_networks import headless_network
from pipeline.encoder.weights import load_backbone
from pipeline.photos.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from tests.pipeline.test_encoder import CPU, random_pixels


@pytest.mark.parametrize(
    ("name", "feature_dim"),
    [
        ("resnet18", 512),
        ("mobilenet_v2", 1280),
        ("shufflenet_v2_x0_5", 1024),
        ("efficientnet_b0", 1280),
        ("densenet121", 1024),
        ("vit_b_32", 768),
        ("regnet_y_400mf", 440),  # cannot be built on the meta device
    ],
)
def test_any_classifier_loses_its_head_and_keeps_its_features(
    name: str, feature_dim: int, tmp_path: Path
) -> None:
    """The features are the inputs of the last linear layer of torchvision's own network."""
    torch.manual_seed(1)
    whole = models.get_model(name, weights=None).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    size = 224 if name == "vit_b_32" else 64
    backbone = load_backbone(name, str(tmp_path / "w.pth"))
    assert backbone.feature_dim == feature_dim
    encoder = Encoder(backbone, device=CPU, precision="float32", image_size=size)
    pixels = random_pixels(2, size)
    seen: list[torch.Tensor] = []
    last = [module for module in whole.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    with torch.no_grad():
        whole((pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    features = encoder.encode(pixels)
    assert features.shape == (2, feature_dim)
    assert features.dtype == torch.float16
    torch.testing.assert_close(features.float(), seen[0], rtol=2e-3, atol=2e-3)


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
