"""Networks of timm: their own pixels, features as timm computes them, one line for what fails."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, fx, nn

from cache.store import open_cache
from pipeline.captioner import Captioner
from pipeline.encoder.encoder import Encoder, load_recorded
from pipeline.encoder.errors import EncoderError, MissingPackageError
from pipeline.encoder.fusion.batchnorm import fold_batchnorm
from pipeline.encoder.networks import timm_networks
from pipeline.encoder.precision import encode_plain
from pipeline.encoder.weights import load_backbone
from pipeline.photos.preprocessing import preprocess
from tests.conftest import write_photo
from tests.pipeline.test_cli import cap
from tests.pipeline.test_encoder import CPU, random_pixels
from train.model.bundle import load_bundle

timm = pytest.importorskip("timm")
LITE = "tf_efficientnet_lite2"


def pixels_of(config: dict[str, Any], pixels: Tensor) -> Tensor:
    """Normalized as timm's configuration says."""
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize(
    ("name", "feature_dim", "size", "other_size"),
    [
        ("test_efficientnet", 256, 160, 64),  # BatchNorm and activation in one module
        ("test_vit", 64, 160, 96),  # position embeddings
        ("test_convnext", 64, 160, 64),
        ("edgenext_xx_small", 168, 256, 64),  # convolutions and attention, without BatchNorm
        ("mobilenetv3_small_050", 1024, 224, 64),
    ],
)
def test_features_are_those_of_timm(
    name: str, feature_dim: int, size: int, other_size: int, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    whole = timm.create_model(name, pretrained=False).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    backbone = load_backbone(f"timm:{name}", str(tmp_path / "w.pth"), other_size)
    assert (backbone.feature_dim, backbone.image_size) == (feature_dim, size)
    plain = timm.create_model(name, pretrained=False, num_classes=0).eval()
    kept = {key: value for key, value in whole.state_dict().items() if key in plain.state_dict()}
    plain.load_state_dict(kept)
    if hasattr(plain, "set_input_size"):
        plain.set_input_size(img_size=(other_size, other_size))
    config = timm.data.resolve_model_data_config(whole)
    pixels = random_pixels(2, other_size)
    encoder = Encoder(backbone, device=CPU, precision="float32", image_size=other_size)
    with torch.inference_mode():
        expected = plain(pixels_of(config, pixels))
    assert torch.allclose(encode_plain(backbone, pixels, CPU), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(encoder.encode(pixels).float(), expected, rtol=4e-3, atol=2e-3)


def test_a_networks_own_pixels_are_recorded(tmp_path: Path) -> None:
    vit = load_backbone("timm:test_vit", "random")
    assert str(vit.preprocessing) == "rgb, bicubic antialiased, mean 0.5 0.5 0.5, std 0.5 0.5 0.5"
    write_photo(tmp_path / "photos" / "a.jpg", 0)
    out = tmp_path / "x.h5"
    extract = ["extract-features", "--images", tmp_path / "photos", "--out", out]
    cap(*extract, "--backbone", "timm:test_vit", "--weights", "random", "--device", "cpu")
    made = open_cache(out).encoder
    assert (made.backbone, made.weights, made.image_size) == ("timm:test_vit", "random", 160)
    assert made.preprocessing == str(vit.preprocessing)
    pixels = preprocess((tmp_path / "photos/a.jpg").read_bytes(), 160, filter="bicubic")
    stored = torch.from_numpy(open_cache(out).read_rows(np.array([0])))[0].float()
    features = Encoder(vit, device=CPU, precision="float32", image_size=160).encode(pixels)
    assert torch.allclose(features.float(), stored, atol=1e-3)
    _, err = cap(*extract, "--update", "--device", "cpu")
    expected = f"as {out} was made: backbone timm:test_vit, weights random, image size 160\n"
    assert expected in err


def test_the_hash_is_that_of_the_weights_before_they_are_resampled() -> None:
    own, smaller = (load_backbone("timm:test_vit", "random", size) for size in (None, 96))
    assert own.weights_sha256 == smaller.weights_sha256
    shapes = [backbone.network.state_dict()["pos_embed"].shape for backbone in (own, smaller)]
    assert shapes[0] != shapes[1]
    record = Encoder(smaller, device=CPU, precision="float32", image_size=96).record
    again = load_recorded(record)
    pixels = random_pixels(2, 96)
    assert torch.equal(encode_plain(again, pixels, CPU), encode_plain(smaller, pixels, CPU))


def test_random_weights_are_seeded_and_near_unit_scale() -> None:
    torch.manual_seed(5)
    first = load_backbone("timm:test_resnet", "random")
    torch.manual_seed(6)
    second = load_backbone("timm:test_resnet", "random")
    features = encode_plain(first, random_pixels(8, 160), CPU)
    assert first.weights_sha256 == second.weights_sha256
    assert torch.equal(features, encode_plain(second, random_pixels(8, 160), CPU))
    assert 0.05 < float(features.abs().mean()) < 20
    measured = [m for m in first.network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(m.running_var is not None and not m.running_var.eq(1).all() for m in measured)


def test_weights_by_other_names_are_renamed_as_timm_does(tmp_path: Path) -> None:
    """A ViT's positions at another size, and ConvNeXt's names of its authors."""
    vit = timm.create_model("test_vit", img_size=96).state_dict()
    torch.save({"model": vit}, tmp_path / "vit.pth")
    with pytest.raises(EncoderError, match=r"pos_embed is \(1, 37, 64\), must be \(1, 101, 64\)"):
        load_backbone("timm:test_vit", str(tmp_path / "vit.pth"))
    state = timm.create_model("test_convnext").state_dict()
    theirs = {
        key.replace(".blocks.", ".")
        .replace("stem.", "downsample_layers.0.")
        .replace(".conv_dw.", ".dwconv.")
        .replace(".mlp.fc1.", ".pwconv1.")
        .replace(".mlp.fc2.", ".pwconv2."): value
        for key, value in state.items()
    }
    theirs = {
        key.replace(f"stages.{stage}.downsample.", f"downsample_layers.{stage}."): value
        for key, value in theirs.items()
        for stage in ([int(key.split(".")[1])] if key.startswith("stages.") else [0])
    }
    theirs = {key.replace("head.norm.", "norm."): value for key, value in theirs.items()}
    torch.save(theirs, tmp_path / "theirs.pth")
    torch.save(state, tmp_path / "timms.pth")
    shas = [
        load_backbone("timm:test_convnext", str(tmp_path / name)).weights_sha256
        for name in ("theirs.pth", "timms.pth")
    ]
    assert shas[0] == shas[1]


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "resnet.pth")
    for name, weights, message in (
        ("timm:resnet5", "random", "timm has no network 'resnet5'; did you mean timm:resnet5"),
        ("timm:", "random", "timm has no network ''"),
        ("timm:resnet18.nonsense", "random", "timm has no weights 'nonsense' of resnet18; there"),
        ("timm:test_vit", "absent.pth", "no such weights file, timm's own weights are called 'pre"),
        ("timm:test_vit", str(tmp_path / "resnet.pth"), "not weights of timm:test_vit"),
        ("timm:test_vit", "IMAGENET1K_V1", "no such weights file"),
    ):
        with pytest.raises(EncoderError, match=message) as caught:
            load_backbone(name, weights)
        assert "\n" not in str(caught.value)
    with pytest.raises(EncoderError, match="100×100 pixels: it sees patches of 16; 96 or 112 "):
        load_backbone("timm:test_vit", "random", 100)
    with pytest.raises(EncoderError, match="timm:mixer_s32_224 cannot take 64×64 pixels"):
        load_backbone("timm:mixer_s32_224", "random", 64).check_image_size(64)


def test_a_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("the Hub cannot be reached\nand more lines")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(EncoderError, match="--weights PATH") as caught:
        load_backbone("timm:test_vit", "pretrained")
    assert str(caught.value).startswith(
        "cannot download the weights of timm:test_vit (the Hub cannot be reached); "
    )


def test_a_network_of_grids_is_refused_by_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    made = timm.create_model

    def grids(name: str, **options: Any) -> nn.Module:
        network: nn.Module = made(name, **options, global_pool="")
        return network

    monkeypatch.setattr(timm, "create_model", grids)
    with pytest.raises(EncoderError, match=r"gives \(96, 5, 5\) for a photo and not one vector"):
        load_backbone("timm:test_resnet", "random")


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    monkeypatch.setattr(sys, "meta_path", [_WithoutTimm(), *sys.meta_path])
    with pytest.raises(MissingPackageError, match=r"^timm is not installed; .* 'cap\[timm\]'$"):
        timm_networks.timm_network("timm:resnet18")
    record = Encoder(load_backbone("resnet18", "random"), device=CPU, precision="float32").record
    with pytest.raises(MissingPackageError, match=r"'cap\[timm\]'$"):
        load_recorded(type(record)(**{**vars(record), "backbone": "timm:resnet18"}))


class _WithoutTimm:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'", name="timm")


def test_timms_modules_are_folded_and_fused() -> None:
    """BatchNorm with its activation, and TensorFlow's padding, odd sizes too."""
    options = {"num_classes": 0, "pad_type": "same", "act_layer": "relu"}
    network = timm.create_model("test_efficientnet", **options)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    network.eval()
    kinds = {type(module).__name__ for module in network.modules()}
    assert {"BatchNormAct2d", "Conv2dSame"} <= kinds
    folded = fold_batchnorm(network)
    assert isinstance(folded, fx.GraphModule)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert {type(module).__name__ for module in network.modules()} == kinds  # only a copy changes
    for size in (64, 75):
        images = torch.randn(2, 3, size, size)
        with torch.inference_mode():
            assert torch.allclose(folded(images), network(images), rtol=1e-3, atol=1e-4)


def test_code_that_cannot_be_traced_runs_plainly_with_a_notice() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.two(self.one(x))
            return (x if x.sum() > 0 else -x).mean((2, 3))

    from pipeline.encoder.backbone import Backbone

    backbone = Backbone("branching", "random", "", 8, Branching().eval())
    encoder = Encoder(backbone, device=CPU, precision="float32", image_size=32)
    assert encoder.notices == ["branching: its code cannot be traced, so its layers are not fused"]
    pixels = random_pixels(2, 32)
    expected = encode_plain(backbone, pixels, CPU)
    assert torch.allclose(encoder.encode(pixels).float(), expected, rtol=2e-3, atol=2e-3)
    vit = Encoder(load_backbone("timm:test_vit", "random"), device=CPU, precision="float32")
    assert vit.notices == []  # it has nothing to fuse


def test_real_weights_from_photos_to_captions(sample_data: Path, tmp_path: Path) -> None:
    """The whole job. Features are those of timm's own forward on the same pixels."""
    weights = sample_data / "weights" / f"{LITE}.pth"
    if not weights.is_file():
        pytest.skip(f"no {weights.name} in the sample data")
    images = sample_data / "flickr8k" / "images"
    names = (sample_data / "flickr8k" / "train.txt").read_text().split()[:24]
    (tmp_path / "only.txt").write_text("\n".join(names))
    cache, run = tmp_path / "x.h5", tmp_path / "run"
    cap(
        "extract-features", "--images", images, "--captions",
        sample_data / "flickr8k" / "captions.txt", "--only", tmp_path / "only.txt",
        "--out", cache, "--backbone", f"timm:{LITE}", "--weights", weights, "--device", "cpu",
        "--precision", "float32", "--batch-size", 8,
    )  # fmt: skip
    opened = open_cache(cache)
    assert (opened.encoder.image_size, opened.encoder.feature_dim) == (260, 1280)
    network = timm.create_model(LITE, num_classes=0).eval()
    state = torch.load(weights, weights_only=True)
    network.load_state_dict({key: state[key] for key in network.state_dict()})
    files = [images / opened.paths[row] for row in range(8)]
    shown = []
    for path in files:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((260, 260), Image.Resampling.BICUBIC)
            shown.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
    with torch.inference_mode():
        expected = network(pixels_of(network.pretrained_cfg, torch.stack(shown)))
    stored = torch.from_numpy(opened.read_rows(np.arange(8))).float().squeeze(1)
    assert float(torch.cosine_similarity(stored, expected).min()) >= 0.9999
    cap(
        "train", "--from-cache", cache, "--out", run, "--epochs", 1, "--batch-size", 32,
        "--min-count", 1, "--hidden-size", 32, "--embedding-size", 16, "--val-share", 0.2,
        "--device", "cpu",
    )  # fmt: skip
    assert load_bundle(run).encoder == opened.encoder
    captioner = Captioner.load(run, device="cpu")
    pixels = torch.cat([preprocess(path.read_bytes(), 260, filter="bicubic") for path in files])
    features = captioner.encoder.encode(pixels).float()
    assert float(torch.cosine_similarity(features, stored).min()) >= 0.9999
    out, _ = cap("predict", files[0], "--model", run, "--device", "cpu")
    assert out.startswith(f"{files[0]}\t")
