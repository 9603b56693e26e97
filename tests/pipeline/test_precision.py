from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from pipeline.bench.jpegs import write_bench_photos
from pipeline.encoder import encoder as encoder_module
from pipeline.encoder.encoder import (
    Encoder,
    EncoderError,
    choose_precision,
    encode_plain,
    fast_precisions,
    load_backbone,
)
from pipeline.photos.photo_file import read_file
from pipeline.photos.preprocessing import IMAGENET_MEAN, IMAGENET_STD, preprocess
from tests.conftest import record

CPU = torch.device("cpu")


def random_pixels(count: int, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, 6, 6), generator=generator).float()
    return nn.functional.interpolate(coarse, (size, size), mode="bilinear").to(torch.uint8)


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
    """Against torchvision's own network, with its last linear layer made the identity by hand."""
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


def test_weights_come_from_any_file_that_fits(tmp_path: Path) -> None:
    torch.manual_seed(2)
    state = models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "ddp.pth")
    headless = {k: v for k, v in state.items() if not k.startswith("fc.")}
    torch.save(headless, tmp_path / "headless.pth")
    save_file(state, tmp_path / "w.safetensors")
    hashes = {
        load_backbone("resnet18", str(path)).weights_sha256 for path in sorted(tmp_path.iterdir())
    }
    assert len(hashes) == 1
    state["conv1.weight"][0, 0, 0, 0] += 1
    torch.save(state, tmp_path / "other.pth")
    assert load_backbone("resnet18", str(tmp_path / "other.pth")).weights_sha256 not in hashes


def test_wrong_weights_are_one_line(tmp_path: Path) -> None:
    torch.save(models.resnet34(weights=None).state_dict(), tmp_path / "34.pth")
    torch.save(models.mobilenet_v2(weights=None).state_dict(), tmp_path / "mobile.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("not weights")
    for weights, message in (
        ("34.pth", "not weights of resnet18"),
        ("mobile.pth", "not weights of resnet18"),
        ("list.pth", "holds no state dict"),
        ("text.pth", r"not a weights file \(no state dict, or one with more than tensors in it\)"),
        ("absent.pth", "no such weights file, and not a published name .*IMAGENET1K_V1"),
    ):
        with pytest.raises(EncoderError, match=message) as caught:
            load_backbone("resnet18", str(tmp_path / weights))
        assert "\n" not in str(caught.value)


def test_weights_that_run_code_are_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (__import__("os").system, (f"touch {tmp_path}/ran",))

    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(EncoderError, match="not a weights file"):
        load_backbone("resnet18", str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "ran").exists()


def test_backbones_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(EncoderError, match="no backbone 'resnet15'"):
        load_backbone("resnet15", "random")
    with pytest.raises(EncoderError, match="does not end in a linear layer"):
        load_backbone("squeezenet1_0", "random")
    with pytest.raises(EncoderError, match="cannot take 64×64"):
        Encoder(load_backbone("vit_b_32", "random"), device=CPU, precision="float32", image_size=64)


def test_random_weights_are_seeded_and_near_unit_scale() -> None:
    torch.manual_seed(5)
    first = load_backbone("resnet50", "random")
    torch.manual_seed(6)
    second = load_backbone("resnet50", "random")
    assert first.weights_sha256 == second.weights_sha256
    features = encode_plain(first, random_pixels(8, 128), CPU)
    assert torch.equal(features, encode_plain(second, random_pixels(8, 128), CPU))
    assert 0.05 < float(features.mean()) < 20


def test_a_batch_does_not_change_a_photos_features() -> None:
    encoder = Encoder(load_backbone("resnet18", "random"), device=CPU, precision="float32")
    pixels = random_pixels(5, 224)
    together = encoder.encode(pixels).float()
    alone = torch.cat([encoder.encode(p.unsqueeze(0)) for p in pixels]).float()
    assert float(torch.cosine_similarity(together, alone).min()) > 0.99999
    black = torch.zeros_like(pixels)
    black[2] = pixels[2]
    assert torch.equal(encoder.encode(black)[2].float(), together[2])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fast_features_agree_with_the_plain_network(precision: str) -> None:
    backbone = load_backbone("resnet18", "random")
    encoder = Encoder(backbone, device=CPU, precision=precision, image_size=64)
    fast = encoder.encode(random_pixels(8)).float()
    cosine = torch.cosine_similarity(fast, encode_plain(backbone, random_pixels(8), CPU))
    assert float(cosine.min()) > (0.99999 if precision == "float32" else 0.999)


def test_resnet152_is_fast_only_where_it_agrees_with_the_plain_network(tmp_path: Path) -> None:
    """Every precision that `auto` may take on this machine, on photo-like pictures."""
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


def test_a_precision_is_judged_by_the_mean_too(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone("resnet18", "random")
    monkeypatch.setattr(encoder_module, "MEAN_COSINE", 0.9999999)
    chosen = choose_precision(
        backbone, random_pixels(4), device=CPU, candidates=("bfloat16", "float32")
    )
    assert chosen[0] == "float32"


def test_the_network_a_precision_was_judged_by_is_the_one_used() -> None:
    backbone = load_backbone("resnet18", "random")
    pixels = random_pixels(4)
    choose_precision(backbone, pixels, device=CPU, candidates=("bfloat16", "float32"))
    judged = backbone.fast_network(CPU, torch.bfloat16, 64)
    used = Encoder(backbone, device=CPU, precision="bfloat16", image_size=64)
    assert used._network is judged
    assert backbone.fast_network(CPU, torch.float32, 64) is not judged


def test_a_precision_that_strays_is_turned_down(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone("resnet18", "random")
    pixels = random_pixels(4)
    candidates = ("bfloat16", "float32")
    assert choose_precision(backbone, pixels, device=CPU, candidates=candidates) == ("bfloat16", [])
    monkeypatch.setattr(encoder_module, "MIN_COSINE", 0.999999999)
    precision, notices = choose_precision(backbone, pixels, device=CPU, candidates=candidates)
    assert precision == "float32"
    assert len(notices) == 1
    assert "resnet18 in bfloat16 strays from float32" in notices[0]


def test_mobilenet_in_bfloat16_strays_on_real_photos(sample_data: Path) -> None:
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
    assert "strays from float32" in notices[0]


def test_a_record_is_stitched_to_its_own_weights_only() -> None:
    made = Encoder(load_backbone("resnet18", "random"), device=CPU, precision="float32").record
    assert Encoder.load(made, device=CPU).record == made
    with pytest.raises(EncoderError, match=r"random: weights .*, the model was trained on .* abab"):
        Encoder.load(record(preprocessing=made.preprocessing), device=CPU)
    with pytest.raises(EncoderError, match="preprocessing 'none'"):
        Encoder.load(record(), device=CPU)


def test_a_batch_too_large_for_the_memory_is_halved_until_it_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone = load_backbone("resnet18", "random")
    encoder = Encoder(backbone, device=CPU, precision="float32", image_size=64)
    pixels = random_pixels(9)
    expected = encoder.encode(pixels)
    forward = encoder._forward

    def small_memory(part: torch.Tensor) -> torch.Tensor:
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")
        return forward(part)

    monkeypatch.setattr(encoder, "_forward", small_memory)
    features = encoder.encode(pixels)
    torch.testing.assert_close(features, expected, rtol=1e-2, atol=1e-2)
    assert encoder.notices == [
        "cpu: out of memory with 9 photos at once; going on with 4",
        "cpu: out of memory with 4 photos at once; going on with 2",
    ]
    encoder.encode(pixels)  # remembers what fits
    assert len(encoder.notices) == 2


def test_no_memory_for_one_photo_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone("resnet18", "random")
    encoder = Encoder(backbone, device=CPU, precision="float32", image_size=64)

    def no_memory(part: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(encoder, "_forward", no_memory)
    with pytest.raises(EncoderError, match="out of memory with a single photo of 64×64 pixels"):
        encoder.encode(random_pixels(3))
