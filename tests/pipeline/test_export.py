"""Exported models caption as the captioner does, in processes that know nothing of this project."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from cache.store import DONE, FeatureCache
from pipeline.captioner.captioner import Captioner
from pipeline.captioner.export.card import model_card
from pipeline.captioner.export.export import ExportError, export, format_of, photo_captioner
from pipeline.captioner.export.program import resized_by_products
from pipeline.cli.app import app
from tests.pipeline.test_captioner import trained
from train.config import SearchConfig
from train.model.bundle import find_bundle, load_bundle
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.search.hypotheses import search_several

# As short as can be: every word adds a step to the program, and seconds to its making.
SHORT = SearchConfig(beam_size=2, max_length=3, no_repeat_ngram=2)

READ_PHOTO = """
import json, sys
import numpy as np
from PIL import Image
photo, out = np.array(Image.open(sys.argv[2]).convert("RGB")), []
"""
# What a stranger writes, who has no part of this project.
PROGRAMS = {
    "pt2": """
import torch
facts = {"captioner.json": ""}
program = torch.export.load(sys.argv[1], extra_files=facts).module()
facts = json.loads(facts["captioner.json"])
words, scores = program(torch.from_numpy(photo))
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
facts = json.loads(session.get_modelmeta().custom_metadata_map["captioner.json"])
words, scores = session.run(None, {"pixels": photo})
""",
    "hf": """
import torch
sys.path.insert(0, sys.argv[1])
from captioner import load
captioner = load(sys.argv[1])
facts = captioner.config
words, scores = captioner(torch.from_numpy(photo))
assert captioner.text(words[0]).split() == [facts["words"][n] for n in words[0].tolist() if n > 3]
""",
}
PRINT = """
assert "pipeline" not in sys.modules and "train" not in sys.modules
caption = [facts["words"][n] for n in words[0].tolist() if n > 3]
print(json.dumps({"caption": caption, "score": float(scores[0])}))
"""


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureCache, Path]:
    return trained(photos, tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize("kind", ["pt2", "onnx", "hf"])
def test_a_program_captions_as_the_captioner_does(
    kind: str, run: tuple[FeatureCache, Path], photos: Path, tmp_path: Path
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxscript", reason="ONNX is an extra")
        pytest.importorskip("onnxruntime", reason="ONNX is an extra")
    cache, model = run
    path = photos / cache.paths[int(cache.rows_with(DONE)[0])]
    png = tmp_path / "photo.png"  # a PNG, because decoders of JPEGs differ
    Image.open(path).convert("RGB").save(png)
    out = tmp_path / ("folder" if kind == "hf" else f"captioner.{kind}")
    facts = export(model, out, SHORT, kind=kind)
    assert facts["words"][:4] == ["<pad>", "<start>", "<end>", "<unk>"]
    code = READ_PHOTO + PROGRAMS[kind] + PRINT
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run(
        [sys.executable, "-P", "-c", code, str(out), str(png)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    (expected,) = Captioner.load(model, device="cpu", search_config=SHORT).caption(png)
    assert found["caption"] == list(expected.words)
    assert found["score"] == pytest.approx(expected.score, abs=0.02)


@pytest.mark.parametrize("beams", [1, 3, 5])
@pytest.mark.parametrize("penalty", [0.0, 1.0])
@pytest.mark.parametrize("best", [False, True], ids=["classic", "best"])
def test_the_fixed_search_finds_what_beam_search_finds(
    run: tuple[FeatureCache, Path], beams: int, penalty: float, best: bool
) -> None:
    torch.manual_seed(beams)
    bundle = load_bundle(run[1])
    words = len(bundle.vocabulary)
    config = DecoderConfig(
        feature_dim=512,
        vocab_size=words,
        embedding_size=8,
        hidden_size=12,
        num_layers=2 if best else 1,
        tie_embeddings=best,
        photo_every_step=best,
        start_after_photo=not best,
    )
    decoder = CaptionDecoder(config).eval()
    for parameter in decoder.parameters():
        parameter.data *= 4  # so that photos differ
    bundle = dataclasses.replace(bundle, decoder=decoder)
    asked = SearchConfig(
        beam_size=beams, max_length=7, length_penalty=penalty, captions=min(2, beams)
    )
    captioner, _ = photo_captioner(bundle, find_bundle(run[1]), asked)
    features = torch.randn(40, 512)
    expected = search_several(decoder, features, asked)
    for row, hypotheses in zip(features, expected, strict=True):
        with torch.inference_mode():
            captions, scores = captioner._search(row[None], beams, asked.captions)
        for hypothesis, caption, score in zip(hypotheses, captions, scores, strict=False):
            assert [n for n in caption.tolist() if n > 3] == list(hypothesis.words)
            assert float(score) == pytest.approx(hypothesis.score, abs=1e-4)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(50, 70), (300, 20), (64, 64), (1, 1), (107, 160), (2000, 3)])
def test_a_resize_by_products_is_the_resize(kind: str, size: tuple[int, int]) -> None:
    """To the level: one level in 1% of the pixels changed 9 captions of 199."""
    photo = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    expected = torch.nn.functional.interpolate(photo, (64, 64), mode=kind, antialias=True)
    found = resized_by_products(photo, 64, kind)
    assert torch.equal(found, expected.double())


def cap(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_what_cannot_be_exported_is_said(
    run: tuple[FeatureCache, Path], tmp_path: Path, photos: Path
) -> None:
    model = run[1]
    there = tmp_path / "there.pt2"
    there.write_text("mine")
    for arguments, message in (
        (("--out", there), "exists; name another --out, or --overwrite"),
        (("--out", tmp_path / "x.pt"), "neither .pt2 nor .onnx"),
        (("--out", tmp_path / "no" / "x.pt2"), "no such folder"),
        (("--out", tmp_path / "x.pt2", "--sample"), "does not draw captions"),
        (("--out", tmp_path / "x.pt2", "--view", "mean"), "several views"),
    ):
        said = cap("--model", model, *arguments)
        assert said.exit_code == 1
        assert message in said.stderr
    assert there.read_text() == "mine"
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    said = cap("--model", model, "--out", folder, "--overwrite", "--max-length", 3)
    assert "holds mine.txt, which no export wrote" in said.stderr
    assert (folder / "mine.txt").read_text() == "mine"
    (folder / "mine.txt").unlink()
    done = cap("--model", model, "--out", folder, "--overwrite", "--max-length", 3, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["format"] == "hf"
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "captioner.json", "captioner.py", "config.json", "model.safetensors"),
    }
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_formats_follow_from_names(tmp_path: Path) -> None:
    assert format_of(tmp_path / "a.pt2") == "pt2"
    assert format_of(tmp_path / "a.onnx") == "onnx"
    assert format_of(tmp_path / "a") == "hf"
    with pytest.raises(ExportError):
        format_of(tmp_path / "a.zip")


def test_the_card_says_what_is_known_and_what_is_not() -> None:
    facts: dict[str, Any] = {
        "backbone": "timm:vit_tiny",
        "weights": "x.pth",
        "weights_sha256": "12ab",
        "image_size": 224,
        "views": ["full", "flip"],
        "decoder": {"feature_dim": 1280},
        "words": ["w"] * 104,
        "training": {},
    }
    assert model_card(facts).count("Not recorded.") == 2
    assert "safetensors and timm" in model_card(facts)
    facts["training"] = {"captions": 3000, "scores": {"cider": 0.5, "count": 40}}
    card = model_card(facts)
    assert "- captions: 3,000" in card
    assert "On 40 validation photos" in card
    assert "- CIDEr, times 100: 50.0" in card
    assert "Not recorded." not in card


def test_two_views_are_averaged(photos: Path, tmp_path: Path) -> None:
    cache, model = trained(photos, tmp_path, views=("full", "flip"))
    asked = SearchConfig(beam_size=2, max_length=5, view="mean")
    captioner, facts = photo_captioner(load_bundle(model), find_bundle(model), asked)
    assert facts["views"] == ["full", "flip"]
    row = int(cache.rows_with(DONE)[0])
    with torch.inference_mode():
        pixels = np.array(Image.open(photos / cache.paths[row]).convert("RGB"))
        found = captioner.features(torch.from_numpy(pixels))[0]
    stored = torch.from_numpy(np.array(cache.features[row])).float().mean(0)
    assert float(torch.cosine_similarity(found, stored, dim=0)) > 0.999
