from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from pipeline.encoder.errors import EncoderError
from pipeline.encoder.precision import encode_plain
from pipeline.encoder.weights import load_backbone
from tests.pipeline.test_encoder import CPU, random_pixels


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
        ("text.pth", r"not a weights file \(damaged, or of another kind\)"),
        ("absent.pth", "no such weights file, and not a published name .*IMAGENET1K_V1"),
    ):
        with pytest.raises(EncoderError, match=message) as caught:
            load_backbone("resnet18", str(tmp_path / weights))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float32, float("nan")), (torch.float32, float("-inf")), (torch.float64, 1e300)],
)
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    """Also those that are not finite only in float32."""
    state = models.resnet18(weights=None).state_dict()
    state["layer2.0.conv1.weight"] = state["layer2.0.conv1.weight"].to(dtype)
    state["layer2.0.conv1.weight"][3, 2, 1, 0] = value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match=r"w\.pth: layer2\.0\.conv1\.weight is not finite"):
        load_backbone("resnet18", str(tmp_path / "w.pth"))


def test_weights_that_run_code_are_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (__import__("os").system, (f"touch {tmp_path}/ran",))

    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(EncoderError, match="holds no state dict"):
        load_backbone("resnet18", str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "ran").exists()


def test_random_weights_are_seeded_and_near_unit_scale() -> None:
    torch.manual_seed(5)
    first = load_backbone("resnet50", "random")
    torch.manual_seed(6)
    second = load_backbone("resnet50", "random")
    assert first.weights_sha256 == second.weights_sha256
    features = encode_plain(first, random_pixels(8, 128), CPU)
    assert torch.equal(features, encode_plain(second, random_pixels(8, 128), CPU))
    assert 0.05 < float(features.mean()) < 20


def test_a_weights_file_is_remembered_with_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(models.resnet18(weights=None).state_dict(), tmp_path / "w.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_backbone("resnet18", "w.pth").weights == str(tmp_path / "w.pth")
    assert load_backbone("resnet18", "~/w.pth").weights == str(tmp_path / "w.pth")
    assert load_backbone("resnet18", "random").weights == "random"


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ("~nosuchuser/w.pth", "no such weights file"),
        ("w.pth/w.pth", "no such weights file"),
        ("x" * 256, r"cannot read \(File name too long\)"),
        ("a\0b", r"cannot read \(embedded null byte\)"),
        (".", r"not a weights file \("),
    ],
)
def test_a_path_that_is_no_weights_file_is_one_line(
    weights: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").touch()
    with pytest.raises(EncoderError, match=f"^{re.escape(weights)}: {problem}"):
        load_backbone("resnet18", weights)
