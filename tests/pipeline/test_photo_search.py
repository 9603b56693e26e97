"""`cap search` finds photos by a sentence and by a photo."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from cache.record import CacheError
from cache.store import DONE, FeatureCache
from pipeline.captioner.photo_search import (
    PhotoSearchError,
    Query,
    search_by_photo,
    search_by_words,
)
from pipeline.cli.app import app
from tests.pipeline.test_captioner import trained
from train.model.bundle import Bundle, load_bundle


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureCache, Path]:
    return trained(photos, tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def bundle(run: tuple[FeatureCache, Path]) -> Bundle:
    return load_bundle(run[1])


def sentence_of(run: tuple[FeatureCache, Path]) -> str:
    return str(run[0].captions.texts[0])


def test_every_photo_gets_its_place(run: tuple[FeatureCache, Path], bundle: Bundle) -> None:
    cache = run[0]
    query = Query.of(sentence_of(run), bundle.vocabulary)
    reports: list[tuple[int, int]] = []
    found = search_by_words(
        bundle, cache, query, len(cache) + 5, report=lambda *each: reports.append(each)
    )
    rows = cache.rows_with(DONE)
    assert sorted(photo.path for photo in found) == sorted(cache.paths[row] for row in rows)
    assert reports[-1] == (len(rows), len(rows))
    features = torch.from_numpy(np.array(cache.features[rows, 0]))
    given = torch.tensor(query.numbers).expand(len(rows), -1)
    with torch.no_grad():
        log_probs = bundle.decoder(features, given[:, :-1]).log_softmax(2)
        usual = bundle.decoder(features.float().mean(0)[None], given[:1, :-1]).log_softmax(2)
    expected = log_probs.gather(2, given.unsqueeze(2))[..., 0].sum(1)
    expected -= usual.gather(2, given[:1].unsqueeze(2)).sum()
    scores = {photo.path: photo.score for photo in found}
    for row, score in zip(rows.tolist(), expected.tolist(), strict=True):
        assert scores[cache.paths[row]] == pytest.approx(score, abs=1e-4)
    assert [photo.score for photo in found] == sorted(scores.values(), reverse=True)
    assert search_by_words(bundle, cache, query, 2) == found[:2]


def test_a_query_is_read_as_captions_are(bundle: Bundle) -> None:
    word = next(w for w in bundle.vocabulary.words[4:] if w.isalpha())
    whole = Query.of(f"{word.upper()} xyzzy {word} .", bundle.vocabulary)
    assert whole.words == (word, word, ".")
    assert whole.unknown == ("xyzzy",)
    begun = Query.of(f"{word} {word}", bundle.vocabulary)
    if "." in bundle.vocabulary.words:
        assert len(whole.numbers) == 4  # the caption ends there
    assert len(begun.numbers) == 2
    for nothing in ("xyzzy plugh", "", "."):
        with pytest.raises(PhotoSearchError, match="knows no word"):
            Query.of(nothing, bundle.vocabulary)


def test_the_photo_most_like_a_photo_is_itself(
    photos: Path, run: tuple[FeatureCache, Path]
) -> None:
    cache = run[0]
    name = cache.paths[int(cache.rows_with(DONE)[2])]
    found = search_by_photo(cache, photos / name, 3, device="cpu")
    assert found[0].path == name
    assert found[0].score == pytest.approx(1, abs=1e-3)
    assert found[1].score < 0.999
    in_memory = search_by_photo(cache, (photos / name).read_bytes(), 3, device="cpu")
    assert in_memory == found
    with pytest.raises(PhotoSearchError, match="photo 1: not an image"):
        search_by_photo(cache, b"no photo", 3, device="cpu")


def test_features_of_another_encoder_are_refused(
    photos: Path, tmp_path: Path, bundle: Bundle
) -> None:
    other, _ = trained(photos, tmp_path, image_size=32)
    query = Query(("a",), (5,), ())
    with pytest.raises(CacheError, match="image_size 32, not 64"):
        search_by_words(bundle, other, query, 3)


def cap(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command(photos: Path, run: tuple[FeatureCache, Path]) -> None:
    cache, model = run
    sentence = sentence_of(run)
    common = ("--cache", cache.path, "--device", "cpu", "--top", 3)
    said = cap("search", f"xyzzy {sentence}", "--model", model, "--images", "in", *common)
    lines = said.stdout.splitlines()
    assert len(lines) == 3
    assert all("\tin/" in line for line in lines)
    assert "does not know: xyzzy" in said.stderr
    answer = json.loads(cap("search", sentence, "--model", model, "--json", *common).stdout)
    paths = [photo["path"] for photo in answer["photos"]]
    assert paths == [line.split("\tin/")[1] for line in lines]
    alike = cap("search", "--like", photos / paths[0], *common)
    assert alike.stdout.startswith(f"1.000\t{paths[0]}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a sentence or --like PHOTO"),
        (("a dog", "--like", "x.jpg"), "a sentence or --like PHOTO"),
        (("a dog",), "needs --model"),
        (("--like", "x.jpg", "--model", "run"), "--model has no effect"),
        (("--like", "x.jpg", "--view", "mean"), "--view has no effect"),
        (("--like", "gone.jpg"), "gone.jpg: no such file"),
    ],
)
def test_what_contradicts_itself_is_said(
    run: tuple[FeatureCache, Path], arguments: tuple[str, ...], message: str
) -> None:
    said = cap("search", *arguments, "--cache", run[0].path)
    assert said.exit_code != 0
    assert message in said.stderr
