"""Networks with random weights behave as trained ones do."""

from __future__ import annotations

import pytest
import torch

from pipeline.bench.jpegs import write_bench_photos
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.fusion.batchnorm import BATCHNORMS
from pipeline.encoder.networks.random_weights import random_network
from pipeline.encoder.precision import encode_plain
from pipeline.encoder.weights import load_backbone
from pipeline.photos.preprocessing import preprocess
from tests.pipeline.test_encoder import CPU


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("photos")
    write_bench_photos(folder, 3, 256, 256)
    return torch.cat([preprocess(path.read_bytes(), 224) for path in sorted(folder.iterdir())])


@pytest.mark.parametrize(
    "name",
    ["efficientnet_b0", "mobilenet_v3_small", "mnasnet0_5", "regnet_y_400mf"],
)
def test_rounding_changes_the_features_of_a_random_network_as_little_as_a_trained_ones(
    name: str, pixels: torch.Tensor
) -> None:
    backbone = load_backbone(name, "random")
    plain = encode_plain(backbone, pixels, CPU)
    half = Encoder(backbone, device=CPU, precision="bfloat16").encode(pixels).float()
    assert float(torch.cosine_similarity(half, plain).min()) >= 0.999
    assert float(torch.cosine_similarity(plain[:1], plain[1:]).max()) < 0.999  # photos differ


@torch.inference_mode()
def test_nothing_within_a_deep_random_network_is_near_the_end_of_float16(
    pixels: torch.Tensor,
) -> None:
    """efficientnet_b4 had values up to 490,000."""
    network = random_network("efficientnet_b4")[0].network.eval()
    largest = [0.0]
    for module in network.modules():
        module.register_forward_hook(
            lambda module, inputs, output: largest.append(float(output.abs().max()))
        )
    network((pixels[:1] / 255 - 0.45) / 0.225)
    assert 1 < max(largest) < 6550


def test_a_measured_batchnorm_has_its_own_momentum_again() -> None:
    network = random_network("mobilenet_v3_small")[0].network
    batchnorms = [module for module in network.modules() if isinstance(module, BATCHNORMS)]
    assert {module.momentum for module in batchnorms} == {0.01}
    assert not any(module.training for module in network.modules())


def test_random_resnets_have_the_numbers_that_they_have_always_had() -> None:
    """Caches and models of earlier versions record their hash."""
    headless, sha256 = random_network("resnet18")
    assert sha256.startswith("99ae808ce88c")
    variance = headless.network.state_dict()["layer4.1.bn2.running_var"]
    assert float(variance.mean()) == pytest.approx(0.62655, rel=1e-3)
