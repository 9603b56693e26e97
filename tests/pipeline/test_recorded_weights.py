"""A cache or a model that was moved, or whose weights were, finds them again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cache.record import EncoderRecord
from pipeline.demo.run import OWN_BACKBONE, OWN_WEIGHTS
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.recorded_weights import recorded_backbone
from pipeline.encoder.weights import load_backbone
from tests.conftest import record


@pytest.fixture(scope="module")
def sha256() -> str:
    return load_backbone(OWN_BACKBONE, str(OWN_WEIGHTS)).weights_sha256


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `project/runs/base/best.cap`, current folder and torch's cache beside it."""
    for name in ("project/runs/base", "project/weights", "here", "hub/checkpoints", "old"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path


def of(weights: object, sha256: str) -> EncoderRecord:
    return record(backbone=OWN_BACKBONE, weights=str(weights), weights_sha256=sha256)


@pytest.mark.parametrize(
    ("recorded", "now"),
    [
        ("weights/w.pth", "project/weights/w.pth"),  # a relative path, the whole project moved
        ("{folder}/old/w.pth", "project/w.pth"),
        ("{folder}/old/w.pth", "project/runs/base/w.pth"),
        ("{folder}/old/w.pth", "here/w.pth"),
        ("{folder}/old/w.pth", "hub/checkpoints/w.pth"),
        ("{folder}/old/w.pth", "old/other-name.pth"),
        ("{folder}/absent/w.pth", "project/runs/base/other-name.pth"),
        ("w.pth", "here/other-name.pth"),
    ],
)
def test_weights_are_found_where_they_or_the_model_were_moved(
    recorded: str, now: str, moved: Path, sha256: str
) -> None:
    shutil.copy(OWN_WEIGHTS, moved / now)
    (moved / "project/runs/base/a.pth").write_bytes(b"no weights")
    model = moved / "project/runs/base/best.cap"
    backbone = recorded_backbone(of(recorded.replace("{folder}", str(moved)), sha256), None, model)
    assert backbone.weights_sha256 == sha256
    assert backbone.weights == str(moved / now)


def test_only_weights_with_the_recorded_numbers_count(moved: Path, sha256: str) -> None:
    state = torch.load(OWN_WEIGHTS, weights_only=True)
    state["conv1.0.weight"] = state["conv1.0.weight"] + 1
    torch.save(state, moved / "project/w.pth")
    with pytest.raises(EncoderError) as caught:
        recorded_backbone(of("w.pth", sha256), None, moved / "project/runs/base/best.cap")
    message = str(caught.value)
    assert message.startswith("w.pth: no such weights file, and not a published name of shufflenet")
    assert message.endswith(
        "; name the file with --weights: of shufflenet_v2_x0_5, with numbers whose SHA-256 begins "
        f"{sha256[:12]}"
    )
    with pytest.raises(EncoderError, match=r"/w\.pth: weights .*…, the model was trained .*; na"):
        recorded_backbone(of("w.pth", sha256), str(moved / "project/w.pth"))


def test_a_file_that_is_named_is_the_only_one_tried(moved: Path, sha256: str) -> None:
    shutil.copy(OWN_WEIGHTS, moved / "here/w.pth")
    with pytest.raises(EncoderError, match=r"^absent\.pth: no such weights file"):
        recorded_backbone(of("w.pth", sha256), "absent.pth")
