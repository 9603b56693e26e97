from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.encoder.encoder import Encoder
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.weights import load_backbone
from tests.conftest import record

CPU = torch.device("cpu")


def random_pixels(count: int, size: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (count, 3, 6, 6), generator=generator).float()
    return nn.functional.interpolate(coarse, (size, size), mode="bilinear").to(torch.uint8)


def test_a_batch_does_not_change_a_photos_features() -> None:
    encoder = Encoder(load_backbone("resnet18", "random"), device=CPU, precision="float32")
    pixels = random_pixels(5, 224)
    together = encoder.encode(pixels).float()
    alone = torch.cat([encoder.encode(p.unsqueeze(0)) for p in pixels]).float()
    assert float(torch.cosine_similarity(together, alone).min()) > 0.99999
    black = torch.zeros_like(pixels)
    black[2] = pixels[2]
    assert torch.equal(encoder.encode(black)[2].float(), together[2])


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
        "cpu: out of memory with 9 photos at once; continuing with 4",
        "cpu: out of memory with 4 photos at once; continuing with 2",
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
