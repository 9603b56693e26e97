"""What a cache was begun with need not be said again."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.record import CacheError
from cache.store import open_cache
from pipeline.extraction.config import ExtractConfig, ExtractOptions, settled
from tests.conftest import MakeCache, write_photo
from tests.pipeline.test_cli import SMALL, cap


def test_a_second_command_takes_what_it_does_not_name_from_the_cache(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "x.h5"
    for seed in range(3):
        write_photo(photos / f"{seed}.jpg", seed)
    again = ["extract-features", "--images", photos, "--out", out]
    cap(*again, *SMALL, "--views", "full,flip", "--device", "cpu")
    write_photo(photos / "3.jpg", 3)
    _, err = cap(*again, "--update", "--device", "cpu")  # without a ResNet-152 of ImageNet
    assert (
        f"as {out} was made: backbone resnet18, weights random, views full,flip, image size 64\n"
    ) in err
    cache = open_cache(out)
    assert len(cache) == 4
    assert (cache.encoder.backbone, cache.encoder.views) == ("resnet18", ("full", "flip"))
    new = tmp_path / "new.h5"
    cap("extract-features", "--images", photos, "--out", new, "--reuse", out, "--device", "cpu")
    assert open_cache(new).encoder == cache.encoder


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["--backbone", "resnet50"], "made with backbone resnet18, not resnet50"),
        (["--views", "full"], "made with views full,flip, not full"),
        (["--image-size", "128"], "made with image size 64, not 128"),
    ],
)
def test_another_encoder_is_refused_before_its_weights_are_read(
    named: list[str], message: str, tmp_path: Path, make_cache: MakeCache
) -> None:
    cache = make_cache([["a"]] * 3, views=("full", "flip")).path
    write_photo(tmp_path / "photos" / "a.jpg", 0)
    _, err = cap(
        "extract-features", "--images", tmp_path / "photos", "--out", cache, *named, code=1
    )
    assert err == f"error: {cache}: {message}. Use another --out, or --overwrite.\n"


def test_a_new_cache_has_the_defaults(tmp_path: Path) -> None:
    images, out = tmp_path, tmp_path / "new.h5"
    assert settled(ExtractOptions(images, out)) == (ExtractConfig(images, out), None)
    (tmp_path / "other.h5").write_bytes(b"of somebody else")
    other = tmp_path / "other.h5"
    assert settled(ExtractOptions(images, other)) == (ExtractConfig(images, other), None)


def test_overwrite_takes_nothing_from_what_it_replaces(
    tmp_path: Path, make_cache: MakeCache
) -> None:
    out = make_cache([["a"]] * 3).path
    config, taken = settled(ExtractOptions(tmp_path, out, overwrite=True))
    assert (config.backbone, config.image_size, taken) == ("resnet152", None, None)
    config, taken = settled(ExtractOptions(tmp_path, out, overwrite=True, reuse=out))
    assert (config.backbone, config.image_size) == ("resnet18", 64)
    assert taken == f"as {out} was made: backbone resnet18, weights random, image size 64"


def test_weights_are_those_of_their_backbone(tmp_path: Path, make_cache: MakeCache) -> None:
    old, new = make_cache([["a"]] * 3).path, tmp_path / "new.h5"
    config, _ = settled(ExtractOptions(tmp_path, new, reuse=old, backbone="resnet50"))
    assert (config.backbone, config.weights) == ("resnet50", "IMAGENET1K_V1")
    config, _ = settled(ExtractOptions(tmp_path, new, reuse=old, weights="w.pth"))
    assert (config.backbone, config.weights, config.image_size) == ("resnet18", "w.pth", 64)


def test_the_tokenizer_goes_on_too(tmp_path: Path, make_cache: MakeCache) -> None:
    out = make_cache([["一只狗"]] * 3, tokenizer="characters").path
    config, taken = settled(ExtractOptions(tmp_path, out))
    assert config.tokenizer == "characters"
    assert "tokenizer characters" in str(taken)


def test_what_is_named_stays(tmp_path: Path, make_cache: MakeCache) -> None:
    out = make_cache([["a"]] * 3).path
    named = ExtractOptions(tmp_path, out, backbone="resnet18", weights="random", image_size=64)
    config, taken = settled(named)
    assert (config.backbone, config.weights, config.views, taken) == (
        "resnet18", "random", ("full",), None
    )  # fmt: skip
    with pytest.raises(CacheError, match="made with backbone resnet18, not resnet34"):
        settled(ExtractOptions(tmp_path, out, backbone="resnet34"))
