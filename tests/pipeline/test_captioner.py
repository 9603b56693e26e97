"""Prediction from photos computes the features of the cache, and so the same captions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cache.store import DONE, FeatureCache, open_cache
from pipeline.captioner.cached import caption_cache
from pipeline.captioner.captioner import Captioner
from pipeline.captioner.photo_names import find_photos
from pipeline.captioner.predictions import CaptionError
from pipeline.encoder.errors import EncoderError
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.extract import extract
from pipeline.photos.photo_file import read_photo
from tests.conftest import write_photo
from train.captions.sentence import sentence
from train.captions.views import ViewError
from train.config import Recipe, SearchConfig, TrainConfig
from train.fit.run import train
from train.model.bundle import BundleError, load_bundle
from train.option import SettingError
from train.search.hypotheses import search


def trained(photos: Path, folder: Path, **changes: object) -> tuple[FeatureCache, Path]:
    """A cache and a briefly trained run of it, in `folder`."""
    settings = {
        "images": photos,
        "out": folder / "x.h5",
        "captions": photos / "captions.txt",
        "backbone": "resnet18",
        "weights": "random",
        "image_size": 64,
        "batch_size": 4,
    }
    for _ in extract(ExtractConfig(**(settings | changes))):  # type: ignore[arg-type]
        pass
    for _ in train(
        TrainConfig(
            from_cache=folder / "x.h5",
            out=folder / "run",
            val_share=0.1,
            recipe=Recipe(
                min_count=1,
                embedding_size=16,
                hidden_size=32,
                epochs=8,
                batch_size=8,
                learning_rate=0.01,
            ),
            device="cpu",
        )
    ):
        pass
    return open_cache(folder / "x.h5"), folder / "run"


@pytest.fixture(scope="module")
def stitched(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureCache, Path]:
    return trained(photos, tmp_path_factory.mktemp("stitched"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_prediction_computes_the_cached_features_and_captions(
    photos: Path, tmp_path: Path, precision: str
) -> None:
    cache, run = trained(photos, tmp_path, precision=precision)
    config = SearchConfig(beam_size=3)
    captioner = Captioner.load(run, device="cpu", search_config=config)
    from_cache = caption_cache(load_bundle(run), cache, config)
    rows = cache.rows_with(DONE)
    from_files = captioner.caption(photos / cache.paths[row] for row in rows)
    for row, prediction in zip(rows.tolist(), from_files, strict=True):
        pixels = read_photo(photos / cache.paths[row], 64, ("full",)).pixels
        assert pixels is not None
        features = captioner.encoder.encode(pixels)[0].float()
        stored = torch.from_numpy(np.array(cache.features[row, 0])).float()
        assert float(torch.cosine_similarity(features, stored, dim=0)) >= 0.9999
        assert prediction.caption == from_cache[cache.image_ids[row]].caption
        assert prediction.score == pytest.approx(from_cache[cache.image_ids[row]].score, abs=1e-2)
        assert prediction.caption == sentence(prediction.words, captioner.bundle.vocabulary)
        assert prediction.as_dict()["words"] == list(prediction.words)
    assert any(prediction.caption.endswith(".") for prediction in from_files)


def test_a_cache_made_with_several_views_predicts_from_the_full_one(
    photos: Path, tmp_path: Path
) -> None:
    cache, run = trained(photos, tmp_path, views=("flip", "full"))
    captioner = Captioner.load(run, device="cpu")
    row = int(cache.rows_with(DONE)[0])
    from_cache = caption_cache(load_bundle(run), cache, SearchConfig())[cache.image_ids[row]]
    assert captioner.caption([photos / cache.paths[row]])[0].caption == from_cache.caption


def test_the_mean_of_the_views_is_the_same_from_cache_and_file(
    photos: Path, tmp_path: Path
) -> None:
    cache, run = trained(photos, tmp_path, views=("full", "flip", "crop"))
    bundle = load_bundle(run)
    config = SearchConfig(view="mean")
    captioner = Captioner.load(run, device="cpu", search_config=config)
    rows = cache.rows_with(DONE).tolist()
    from_cache = caption_cache(bundle, cache, config)
    from_files = captioner.caption(photos / cache.paths[row] for row in rows)
    expected = search(
        bundle.decoder,
        torch.from_numpy(cache.features[rows].astype(np.float32).mean(1)),
        config,
    )
    for row, prediction, hypothesis in zip(rows, from_files, expected, strict=True):
        found = from_cache[cache.image_ids[row]]
        assert found.caption == prediction.caption
        assert found.words == bundle.vocabulary.caption_words(hypothesis.words)
        assert found.score == pytest.approx(prediction.score, abs=1e-2)
        assert found.score == pytest.approx(hypothesis.score, abs=1e-5)
    full = caption_cache(bundle, cache, SearchConfig(view="full"))
    assert any(full[i].score != from_cache[i].score for i in full)


def test_the_models_record_says_which_view_it_was_made_for(photos: Path, tmp_path: Path) -> None:
    cache, run = trained(photos, tmp_path, views=("full", "flip"))
    bundle = load_bundle(run)
    by_default = caption_cache(bundle, cache, SearchConfig())
    assert by_default == caption_cache(bundle, cache, SearchConfig(view="full"))
    of_mean = replace(bundle, training={**bundle.training, "view": "mean"})
    of_mean.save(tmp_path / "mean.cap")
    assert caption_cache(of_mean, cache, SearchConfig()) == caption_cache(
        bundle, cache, SearchConfig(view="mean")
    )
    captioner = Captioner.load(tmp_path / "mean.cap", device="cpu")
    row = int(cache.rows_with(DONE)[0])
    found = captioner.caption([photos / cache.paths[row]])[0]
    expected = caption_cache(bundle, cache, SearchConfig(view="mean"))[cache.image_ids[row]]
    assert found.score == pytest.approx(expected.score, abs=1e-2)


def test_a_view_that_is_not_there_is_one_line(
    stitched: tuple[FeatureCache, Path],
) -> None:
    with pytest.raises(ViewError, match="needs several views; the model's encoder makes only full"):
        Captioner.load(stitched[1], device="cpu", search_config=SearchConfig(view="mean"))
    with pytest.raises(SettingError, match="view 'left' is not auto, full or mean"):
        SearchConfig(view="left")
    bundle = load_bundle(stitched[1])
    with pytest.raises(ViewError, match="no view 'left'; choose auto, full or mean"):
        caption_cache(replace(bundle, training={"view": "left"}), stitched[0], SearchConfig())


def test_a_large_cache_is_captioned_piece_by_piece_alike(
    stitched: tuple[FeatureCache, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, run = stitched
    for config in (SearchConfig(), SearchConfig(sample=True, captions=2)):
        whole = caption_cache(load_bundle(run), cache, config)
        monkeypatch.setattr("pipeline.captioner.cached._CACHE_ROWS", 3)
        parts = caption_cache(load_bundle(run), cache, config)
        monkeypatch.undo()
        assert {i: p.caption for i, p in parts.items()} == {i: p.caption for i, p in whole.items()}


def test_one_bad_photo_does_not_cost_the_others_their_captions(
    stitched: tuple[FeatureCache, Path], photos: Path
) -> None:
    captioner = Captioner.load(stitched[1], device="cpu")
    found = captioner.caption([photos / "a.jpg", photos / "e.jpg", "absent.jpg", photos / "b.jpg"])
    assert [bool(prediction.caption) for prediction in found] == [True, False, False, True]
    assert found[1].error == "not an image, or of an unknown format"
    assert found[2].error == "file not found"
    assert captioner.caption([]) == []
    assert captioner.caption([photos / "e.jpg"])[0].error


def test_predictions_do_not_depend_on_the_batch(
    stitched: tuple[FeatureCache, Path], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = Captioner.load(stitched[1], device="cpu")
    paths = sorted(photos.glob("*.jpg"))
    together = captioner.caption(paths)
    monkeypatch.setattr("pipeline.captioner.captioner._BATCH_PHOTOS", 3)
    assert [p.caption for p in captioner.caption(paths)] == [p.caption for p in together]
    assert [captioner.caption([path])[0].caption for path in paths] == [p.caption for p in together]
    assert [p.path for p in together] == [str(path) for path in paths]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_captioner_works_inside_a_callers_inference_mode(
    stitched: tuple[FeatureCache, Path], photos: Path, mode: Any
) -> None:
    expected = Captioner.load(stitched[1], device="cpu").caption(photos / "a.jpg")
    with mode():
        captioner = Captioner.load(stitched[1], device="cpu")
        assert captioner.caption(photos / "a.jpg") == expected
        opened = Image.open(photos / "a.jpg")
        assert captioner.caption(opened)[0].caption == expected[0].caption
    assert captioner.caption(photos / "a.jpg") == expected


def test_a_model_with_other_weights_at_hand_is_refused(
    photos: Path, tmp_path: Path, stitched: tuple[FeatureCache, Path]
) -> None:
    from pipeline.encoder.weights import load_backbone

    state = load_backbone("resnet18", "random").network.state_dict()
    state["conv1.weight"] = state["conv1.weight"] + 1
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(EncoderError, match=r"other\.pth: weights .*, the model was trained on"):
        Captioner.load(stitched[1], device="cpu", weights=str(tmp_path / "other.pth"))


def test_model_files_that_are_none_are_one_line(
    tmp_path: Path, stitched: tuple[FeatureCache, Path]
) -> None:
    with pytest.raises(BundleError, match="not found"):
        load_bundle(tmp_path / "absent")
    with pytest.raises(BundleError, match=r"no best\.cap or last\.cap in it"):
        load_bundle(tmp_path)
    good = (stitched[1] / "best.cap").read_bytes()
    for i, data in enumerate((b"", b"junk" * 100, good[:500], good[:-10], good + b"x")):
        (tmp_path / f"{i}.cap").write_bytes(data)
        with pytest.raises(BundleError, match=rf"{i}\.cap: not a model file") as caught:
            load_bundle(tmp_path / f"{i}.cap")
        assert "\n" not in str(caught.value)
    renamed = good.replace(b'\\"hidden_size\\": 32', b'\\"hidden_size\\": 64', 1)
    assert renamed != good
    (tmp_path / "sizes.cap").write_bytes(renamed)
    with pytest.raises(BundleError, match="damaged model file"):
        load_bundle(tmp_path / "sizes.cap")


@pytest.mark.parametrize(
    "config",
    [SearchConfig(), SearchConfig(beam_size=1), SearchConfig(sample=True, captions=2)],
    ids=["beam", "greedy", "sample"],
)
def test_probabilities_that_are_nan_are_an_error(
    photos: Path, stitched: tuple[FeatureCache, Path], tmp_path: Path, config: SearchConfig
) -> None:
    """Of weights that are finite but so large that the logits are not."""
    bundle = load_bundle(stitched[1])
    with torch.no_grad():
        bundle.decoder.head.weight.fill_(3e38)
        bundle.decoder.head.bias.fill_(-3e38)
        bundle.decoder.head.weight[::2] *= -1
    bundle.save(tmp_path / "x.cap")
    captioner = Captioner.load(tmp_path / "x.cap", device="cpu", search_config=config)
    found = captioner.caption([photos / "a.jpg"])[0]
    assert found.error == "the model's probabilities are not finite (NaN or infinity)"
    assert not found.captions
    with pytest.raises(CaptionError, match=r"x\.h5: no caption for a\.jpg \(the model's prob"):
        caption_cache(bundle, stitched[0], config)


def test_folders_and_globs_are_searched_for_photos(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.jpg", "sub/c.jpg"):
        write_photo(tmp_path / name, 0)
    (tmp_path / "note.txt").touch()
    assert find_photos([str(tmp_path)]) == [
        str(tmp_path / name) for name in ("a.jpg", "b.jpg", "sub/c.jpg")
    ]
    assert find_photos([f"{tmp_path}/*.jpg", f"{tmp_path}/a.jpg"]) == [
        str(tmp_path / name) for name in ("a.jpg", "b.jpg")
    ]
    assert find_photos(["absent.jpg"]) == ["absent.jpg"]
