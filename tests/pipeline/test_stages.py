"""`NAME+stages`: the vector of a network and the averages of the stages before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cache.store import open_cache
from pipeline.captioner import Captioner
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.encoder import Encoder, load_recorded
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.stages import _of_one_scale
from pipeline.encoder.precision import encode_plain
from pipeline.encoder.weights import load_backbone
from tests.conftest import write_photo
from tests.pipeline.test_cli import cap
from tests.pipeline.test_encoder import CPU, random_pixels

SIZE = 64


def expected(plain: Backbone, stages: dict[str, tuple[int, int]], images: Tensor) -> Tensor:
    """By hooks in the plain network. stages: by the name of a module, the axes of its grid."""
    parts: dict[str, Tensor] = {}
    for name, axes in stages.items():
        plain.network.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name, axes=axes: parts.update({name: output.mean(axes)})
        )
    own = plain.network(images)
    vectors = [own, *(parts[name] for name in stages)]
    return torch.cat([v / v.square().mean(1, keepdim=True).sqrt() for v in vectors], 1)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("mobilenet_v2", {"features.17": (2, 3), "features.16": (2, 3)}),
        ("resnet18", {"layer3": (2, 3)}),  # the vector is the average of `layer4`
        ("alexnet", {"avgpool": (2, 3)}),  # the vector is of a layer behind the grid
        ("swin_t", {"features.5": (1, 2)}),  # channels last
        ("googlenet", {"inception5a": (2, 3)}),  # what its four branches make together
        ("timm:test_efficientnet", {"blocks": (2, 3)}),  # of padding and activations in one module
    ],
)
def test_the_stages_before_the_vector_stand_beside_it(
    name: str, stages: dict[str, tuple[int, int]]
) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    plain = load_backbone(name, "random")
    size = plain.image_size if name.startswith("timm:") else SIZE
    both = load_backbone(f"{name}+stages", "random")
    assert (both.name, both.weights_sha256) == (f"{name}+stages", plain.weights_sha256)
    images = random_pixels(3, size) / 127.5 - 1
    with torch.no_grad():
        wanted = expected(plain, stages, images)
        assert torch.allclose(both.network(images), wanted, atol=1e-4)
        fast = both.fast_network(CPU, torch.float32, size)
        found = both.run(fast, images)
    assert isinstance(fast, torch.fx.GraphModule)
    assert both.feature_dim == wanted.shape[1] > plain.feature_dim
    assert torch.allclose(found, wanted, atol=2e-3)
    widths = [plain.feature_dim, both.feature_dim - plain.feature_dim]
    for part in found.split(widths, 1)[: 2 if len(stages) == 1 else 1]:
        assert torch.allclose(part.square().mean(1), torch.ones(3), atol=1e-3)


def test_a_part_of_zeros_stays_so() -> None:
    part = torch.zeros(2, 8)
    part[1, 3] = 300.0  # the square of which float16 does not hold
    scaled = _of_one_scale(part.half())
    assert torch.isfinite(scaled).all()
    assert not scaled[0].any()
    assert float(scaled[1].square().mean()) == pytest.approx(1)


def test_networks_without_stages_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="has no stages of other features beside"):
        load_backbone("vit_b_32+stages", "random")
    (tmp_path / "own.py").write_text("def make():\n    return None\n")
    with pytest.raises(EncoderError, match="makes its own vector; leave out"):
        load_backbone(f"{tmp_path}/own.py:make+stages", "")
    with pytest.raises(EncoderError, match="no backbone 'resnet'; did"):
        load_backbone("resnet+stages", "random")


def test_from_photos_to_captions(tmp_path: Path) -> None:
    lines = ["image,caption"]
    for seed in range(12):
        write_photo(tmp_path / "photos" / f"{seed}.jpg", seed)
        lines.append(f"{seed}.jpg,A photo number {seed}.")
    (tmp_path / "c.csv").write_text("\n".join(lines))
    extract = [
        *("extract-features", "--images", tmp_path / "photos", "--captions", tmp_path / "c.csv"),
        *("--out", tmp_path / "x.h5", "--weights", "random", "--device", "cpu"),
        *("--image-size", SIZE, "--precision", "float32"),
    ]
    cap(*extract, "--backbone", "resnet18+stages")
    cache = open_cache(tmp_path / "x.h5")
    assert (cache.encoder.backbone, cache.encoder.feature_dim) == ("resnet18+stages", 512 + 256)
    backbone = load_recorded(cache.encoder)
    pixels = random_pixels(2, SIZE)
    plain = encode_plain(backbone, pixels, CPU)
    found = Encoder.load(cache.encoder, device=CPU).encode(pixels).float()
    assert float(torch.cosine_similarity(found, plain).min()) > 0.9999
    _, refused = cap(*extract, "--backbone", "resnet18", code=1)
    assert "made with backbone resnet18+stages, not resnet18" in refused
    small = ["--epochs", 1, "--hidden-size", 16, "--embedding-size", 8, "--val-share", 0.2]
    cap("train", "--from-cache", tmp_path / "x.h5", "--out", tmp_path / "run", *small)
    captioner = Captioner.load(tmp_path / "run", device="cpu")
    assert captioner.encoder.record == cache.encoder
    assert captioner.caption(tmp_path / "photos" / "3.jpg")
