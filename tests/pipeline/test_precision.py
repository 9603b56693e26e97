from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.bench.jpegs import write_bench_photos
from pipeline.encoder import precision as precision_module
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.encoder import Encoder
from pipeline.encoder.errors import EncoderError, PrecisionError
from pipeline.encoder.precision import (
    check_features,
    choose_precision,
    encode_plain,
    fast_precisions,
)
from pipeline.encoder.weights import load_backbone
from pipeline.photos.photo_file import read_file
from pipeline.photos.preprocessing import preprocess
from tests.pipeline.test_encoder import CPU, random_pixels


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fast_features_agree_with_the_plain_network(precision: str) -> None:
    backbone = load_backbone("resnet18", "random")
    encoder = Encoder(backbone, device=CPU, precision=precision, image_size=64)
    fast = encoder.encode(random_pixels(8)).float()
    cosine = torch.cosine_similarity(fast, encode_plain(backbone, random_pixels(8), CPU))
    assert float(cosine.min()) > (0.99999 if precision == "float32" else 0.999)


def test_resnet152_is_fast_only_where_it_agrees_with_the_plain_network(tmp_path: Path) -> None:
    """Every precision that `auto` may choose on this machine, on pictures like photos."""
    write_bench_photos(tmp_path, 4, 256, 256)
    pixels = torch.cat([preprocess(path.read_bytes(), 224) for path in sorted(tmp_path.iterdir())])
    backbone = load_backbone("resnet152", "random")
    plain = encode_plain(backbone, pixels, CPU)
    for precision in fast_precisions(CPU):
        fast = Encoder(backbone, device=CPU, precision=precision).encode(pixels).float()
        cosines = torch.cosine_similarity(fast, plain)
        assert float(cosines.min()) >= 0.999
        assert float(cosines.mean()) >= 0.9999
    assert float(torch.cosine_similarity(plain[:1], plain[1:]).max()) < 0.999  # photos differ


def test_the_mean_cosine_can_reject_a_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone("resnet18", "random")
    monkeypatch.setattr(precision_module, "MEAN_COSINE", 0.9999999)
    chosen = choose_precision(
        backbone, random_pixels(4), device=CPU, candidates=("bfloat16", "float32")
    )
    assert chosen[0] == "float32"


def test_the_network_that_was_compared_is_the_one_used() -> None:
    backbone = load_backbone("resnet18", "random")
    pixels = random_pixels(4)
    choose_precision(backbone, pixels, device=CPU, candidates=("bfloat16", "float32"))
    compared = backbone.fast_network(CPU, torch.bfloat16, 64)
    used = Encoder(backbone, device=CPU, precision="bfloat16", image_size=64)
    assert used._network is compared
    assert backbone.fast_network(CPU, torch.float32, 64) is not compared


def test_a_precision_that_differs_too_much_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone("resnet18", "random")
    pixels = random_pixels(4)
    candidates = ("bfloat16", "float32")
    assert choose_precision(backbone, pixels, device=CPU, candidates=candidates) == ("bfloat16", [])
    monkeypatch.setattr(precision_module, "MIN_COSINE", 0.999999999)
    precision, notices = choose_precision(backbone, pixels, device=CPU, candidates=candidates)
    assert precision == "float32"
    assert len(notices) == 1
    assert "resnet18 in bfloat16 differs too much from float32" in notices[0]


def test_images_that_the_network_cannot_take_are_one_line_before_precisions_are_compared() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 33), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    backbone = Backbone("tower", "random", "", 8, network)
    with pytest.raises(EncoderError, match=r"^tower cannot take 32×32 pixels \(.*\)$"):
        choose_precision(
            backbone, random_pixels(2, 32), device=CPU, candidates=("bfloat16", "float32")
        )


def test_mobilenet_in_bfloat16_differs_too_much_on_real_photos(sample_data: Path) -> None:
    weights = sample_data / "weights" / "mobilenet_v2_imagenet.pth"
    photos = sorted((sample_data / "coco" / "val2017").iterdir())[:16]
    pixels = torch.cat([preprocess(read_file(path), 224) for path in photos])
    precision, notices = choose_precision(
        load_backbone("mobilenet_v2", str(weights)),
        pixels,
        device=CPU,
        candidates=("bfloat16", "float32"),
    )
    assert precision == "float32"
    assert "differs too much from float32" in notices[0]


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Backbone:
    """A ResNet-18 after `change` of its state dict, in place."""
    backbone = load_backbone("resnet18", "random")
    change(backbone.network.state_dict())
    return backbone


def test_nan_that_a_fused_relu_hides_is_found() -> None:
    """Finite weights whose sums overflow: infinity minus infinity is NaN, of which ReLU makes 0."""
    backbone = changed(lambda state: state["layer2.0.bn1.weight"].fill_(3e38))
    pixels = random_pixels(2)
    features = Encoder(backbone, device=CPU, precision="float32", image_size=64).encode(pixels)
    assert features.isfinite().all()
    wrong = "not finite even in float32, as after a training that diverged; use other weights"
    with pytest.raises(EncoderError, match=wrong):
        check_features(backbone, pixels[:1], features[0], "float32")
    with pytest.raises(EncoderError, match=wrong):
        choose_precision(backbone, pixels, device=CPU, candidates=("bfloat16", "float32"))


def test_features_beyond_float16_are_refused_because_a_cache_stores_float16() -> None:
    backbone = changed(lambda state: state["layer4.1.bn2.weight"].fill_(1e6))
    pixels = random_pixels(1)
    features = Encoder(backbone, device=CPU, precision="float32", image_size=64).encode(pixels)
    assert features.isinf().any()
    with pytest.raises(
        EncoderError, match=r"features up to \d.\de\+06; a cache stores float16, at"
    ):
        check_features(backbone, pixels, features[0], "float32")


def test_features_of_another_picture_are_wrong_and_equal_ones_are_not() -> None:
    backbone = load_backbone("resnet18", "random")
    pixels = random_pixels(1)
    features = Encoder(backbone, device=CPU, precision="float32", image_size=64).encode(pixels)[0]
    check_features(backbone, pixels, features, "float32")
    with pytest.raises(
        EncoderError, match=r"\(cosine 0\.\d\d to those .*; use --precision float32"
    ):
        check_features(backbone, pixels, features.flip(0), "bfloat16")
    nothing = changed(
        lambda state: (
            [state[f"layer4.1.{name}"].zero_() for name in ("bn2.weight", "bn2.bias")]
            + [state[f"layer4.0.{name}.weight"].zero_() for name in ("bn2", "downsample.1")]
        )
    )
    check_features(nothing, pixels, torch.zeros(512, dtype=torch.float16), "float32")


def test_weights_beyond_float16_are_not_computed_in_float16() -> None:
    backbone = changed(
        lambda state: (
            state["layer2.0.bn1.weight"].mul_(1e9),
            state["layer2.0.conv2.weight"].mul_(1e-9),
        )
    )
    with pytest.raises(
        PrecisionError,
        match=r"layer2_0_conv1\.weight, with .* beyond float16's 65,504; float32 and",
    ):
        backbone.fast_network(CPU, torch.float16, 64)
    precision, notices = choose_precision(
        backbone, random_pixels(1), device=CPU, candidates=("float16", "float32")
    )
    assert precision == "float32"
    assert "beyond float16's 65,504" in notices[0]


def test_the_check_of_the_first_photo_is_begun_while_precisions_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU. The meta device stands for it here."""

    class Stops:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            raise InterruptedError

    backbone = load_backbone("resnet18", "random")
    pixels = random_pixels(2)
    features = Encoder(backbone, device=CPU, precision="float32", image_size=64).encode(pixels)
    gpu = torch.device("meta")
    with monkeypatch.context() as patch:
        patch.setattr(precision_module, "Encoder", Stops)
        plain = precision_module.encode_plain
        patch.setattr(precision_module, "encode_plain", lambda b, pixels, _: plain(b, pixels, CPU))
        with pytest.raises(InterruptedError):
            choose_precision(backbone, pixels, device=gpu, candidates=("float16", "float32"))
        (begun,) = backbone.plain.values()
        begun.result()
    plain_runs = []
    monkeypatch.setattr(precision_module, "encode_plain", lambda *_: plain_runs.append(1))
    with pytest.raises(EncoderError, match="gives wrong features"):
        check_features(backbone, pixels[:1], features[0].flip(0), "float16")
    assert plain_runs == []
    with pytest.raises(TypeError, match="NoneType"):  # it was begun once, and for that photo alone
        check_features(backbone, pixels[:1], features[0], "float16")
    assert plain_runs == [1]
