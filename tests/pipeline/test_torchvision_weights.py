"""torchvision's networks with its own weights, of every age, for every size of images."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models.vision_transformer import interpolate_embeddings
from torchvision.transforms.functional import normalize

from pipeline.encoder.backbone import Backbone
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.torchvision_networks import published_preprocessing
from pipeline.encoder.precision import encode_plain
from pipeline.encoder.weights import load_backbone
from pipeline.photos.preprocessing import BICUBIC, IMAGENET, Preprocessing
from tests.pipeline.test_encoder import CPU, random_pixels

State = dict[str, Tensor]
HALF = (0.5, 0.5, 0.5)


def features(whole: nn.Module, pixels: Tensor) -> Tensor:
    """What torchvision's network gives to its last linear layer."""
    seen: list[Tensor] = []
    last = [module for module in whole.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        whole.eval()(normalize(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return seen[0]


def assert_same_features(backbone: Backbone, whole: nn.Module, size: int) -> None:
    pixels = random_pixels(2, size)
    torch.testing.assert_close(
        encode_plain(backbone, pixels, CPU), features(whole, pixels), rtol=1e-4, atol=1e-4
    )


@pytest.fixture
def small_vit(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's ViTs with one narrow layer."""
    whole = models.vision_transformer._vision_transformer

    def small(**options: Any) -> nn.Module:
        sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
        made: nn.Module = whole(**options | sizes)
        return made

    monkeypatch.setattr(models.vision_transformer, "_vision_transformer", small)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Callable[[State], None]:
    """Lets torchvision's downloads give a state dict."""

    def publish(state: State) -> None:
        monkeypatch.setattr(
            "torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state
        )

    return publish


def test_densenets_in_the_old_layout_are_read(
    tmp_path: Path, published: Callable[[State], None]
) -> None:
    """As torchvision's published files have it: `norm.1` where a module is `norm1` by now."""
    torch.manual_seed(1)
    whole = models.densenet121()
    state = whole.state_dict()
    old = {
        name.replace(".norm1.", ".norm.1.").replace(".norm2.", ".norm.2.")
        .replace(".conv1.", ".conv.1.").replace(".conv2.", ".conv.2."): tensor
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }  # fmt: skip
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save({"state_dict": {f"module.{n}": t for n, t in old.items()}}, tmp_path / "old.pth")
    published(old)
    backbone = load_backbone("densenet121", "IMAGENET1K_V1")
    assert_same_features(backbone, whole, 64)
    other = load_backbone("densenet121", str(tmp_path / "old.pth"))
    assert other.weights_sha256 == backbone.weights_sha256


@pytest.mark.usefixtures("small_vit")
def test_vits_in_the_old_layout_are_read(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = models.vit_b_32()
    old = {
        name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for name, tensor in whole.state_dict().items()
    }
    assert "encoder.layers.encoder_layer_0.mlp.linear_2.bias" in old
    torch.save({"model": {f"backbone.{n}": t for n, t in old.items()}}, tmp_path / "old.pth")
    torch.save(whole.state_dict(), tmp_path / "new.pth")
    backbone = load_backbone("vit_b_32", str(tmp_path / "old.pth"))
    assert_same_features(backbone, whole, 224)
    other = load_backbone("vit_b_32", str(tmp_path / "new.pth"))
    assert other.weights_sha256 == backbone.weights_sha256


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_first_version_of_mnasnets_is_read(
    suffix: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """It has another stem; a .safetensors file does not name its version."""
    torch.manual_seed(1)
    whole = models.mnasnet0_5()
    current = whole.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole._load_from_state_dict({}, "", {"version": 1}, False, [], [], [])
    assert whole.state_dict()["layers.0.weight"].shape != current["layers.0.weight"].shape
    for name, state in (("first", whole.state_dict()), ("second", current)):
        save = torch.save if suffix == "pth" else save_file
        save(state, tmp_path / f"{name}.{suffix}")
    assert_same_features(load_backbone("mnasnet0_5", str(tmp_path / f"first.{suffix}")), whole, 64)
    second = load_backbone("mnasnet0_5", str(tmp_path / f"second.{suffix}"))
    assert second.network.state_dict()["layers.0.weight"].shape[0] == 16
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.usefixtures("small_vit")
def test_weights_for_other_sizes_bring_their_size(
    tmp_path: Path, published: Callable[[State], None]
) -> None:
    torch.manual_seed(1)
    whole = models.vit_b_16(image_size=384)
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    published(whole.state_dict())
    backbone = load_backbone("vit_b_16", "IMAGENET1K_SWAG_E2E_V1")
    assert backbone.image_size == 384
    assert backbone.preprocessing == Preprocessing(BICUBIC)
    assert_same_features(backbone, whole, 384)
    from_file = load_backbone("vit_b_16", str(tmp_path / "w.pth"))
    assert from_file.image_size == 384
    assert from_file.weights_sha256 == backbone.weights_sha256


@pytest.mark.usefixtures("small_vit")
@pytest.mark.parametrize("weights", ["random", "file"])
def test_a_vit_takes_other_sizes_with_interpolated_positions(weights: str, tmp_path: Path) -> None:
    if weights == "file":
        torch.manual_seed(1)
        torch.save(models.vit_b_32().state_dict(), tmp_path / "w.pth")
        weights = str(tmp_path / "w.pth")
    own = load_backbone("vit_b_32", weights)
    larger = load_backbone("vit_b_32", weights, 320)
    assert (own.image_size, larger.image_size) == (224, 320)
    assert larger.weights_sha256 == own.weights_sha256
    whole = models.vit_b_32(image_size=320)
    state = interpolate_embeddings(320, 32, own.network.state_dict())
    whole.load_state_dict(state, strict=False)
    assert_same_features(larger, whole, 320)
    with pytest.raises(EncoderError, match=r"^vit_b_32 cannot take 100×100 pixels \(Input shape"):
        load_backbone("vit_b_32", weights, 100)


@pytest.mark.parametrize(
    ("name", "weights", "expected", "image_size"),
    [
        ("resnet18", "DEFAULT", IMAGENET, 224),
        ("googlenet", "DEFAULT", Preprocessing(mean=HALF, std=HALF), 224),
        (
            "inception_v3",
            "inception_v3_google-0cc3c7bd.pth",
            Preprocessing(mean=HALF, std=HALF),
            299,
        ),
        ("efficientnet_b0", "mine.pth", Preprocessing(BICUBIC), 224),
        ("efficientnet_b1", "mine.pth", IMAGENET, 240),
        ("efficientnet_b1", "efficientnet_b1_rwightman-bac287d4.pth", Preprocessing(BICUBIC), 240),
        ("efficientnet_v2_l", "mine.pth", Preprocessing(BICUBIC, HALF, HALF), 480),
        ("regnet_y_16gf", "regnet_y_16gf_swag-43afe44d.pth", Preprocessing(BICUBIC), 384),
        ("regnet_y_16gf", "mine.pth", IMAGENET, 224),
    ],
)
def test_preprocessing_is_what_torchvision_publishes_with_the_weights(
    name: str, weights: str, expected: Preprocessing, image_size: int
) -> None:
    """Of a file: with those that have its name, or else with the default ones."""
    assert published_preprocessing(name, f"some/folder/{weights}") == (expected, image_size)


@pytest.mark.parametrize("changed", ["none", "classes", "missing"])
def test_heads_for_training_alone_may_be_missing_or_of_other_classes(
    changed: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    whole = models.googlenet(init_weights=True, transform_input=True)
    state = whole.state_dict()
    if changed == "classes":
        state["aux1.fc2.weight"] = torch.ones(5, 1024)
    elif changed == "missing":
        state = {name: t for name, t in state.items() if not name.startswith("aux")}
    torch.save(state, tmp_path / "w.pth")
    backbone = load_backbone("googlenet", str(tmp_path / "w.pth"))
    assert_same_features(backbone, whole, 64)
    heads = {name[:4] for name in backbone.network.state_dict() if name.startswith("aux")}
    assert heads == {"none": {"aux1", "aux2"}, "classes": {"aux2"}, "missing": set()}[changed]


def test_published_weights_share_their_memory_with_the_network(
    published: Callable[[State], None],
) -> None:
    state = models.shufflenet_v2_x0_5().state_dict()
    published(state)
    network = load_backbone("shufflenet_v2_x0_5", "IMAGENET1K_V1").network.state_dict()
    assert all(network[name].data_ptr() == state[name].data_ptr() for name in network)
