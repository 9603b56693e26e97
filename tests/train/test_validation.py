from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import MakeCache, real_captions
from train.captions.caption_set import TrainingSetError
from train.captions.script import CHARACTERS
from train.captions.vocabulary import build_vocabulary
from train.config import SearchConfig
from train.fit.validation import ValidationPhotos, ValidationScorer
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.scores.metrics import score
from train.search.hypotheses import search

CAPTIONS = [
    ["A dog runs .", "the dog (brown) is running"],
    ["Two cats sleep .", "cats sleeping on a red bed", "two cats, on a bed!"],
    [],
    ["A man rides a horse .", "a horse and a man ."],
]


@pytest.mark.parametrize("name", ["coco", "flickr8k"])
def test_the_scores_are_those_of_the_evaluation_without_java(sample_data: Path, name: str) -> None:
    captions = real_captions(sample_data, name)
    references = {image: texts[1:] for image, texts in captions.items()}
    scorer = ValidationScorer(list(references.values()))
    for shift in (0, 1):  # the photo's own caption, and that of its neighbour
        own = [texts[0] for texts in captions.values()]
        hypotheses = own[shift:] + own[:shift]
        official = score(dict(zip(captions, hypotheses, strict=True)), references, java=False)
        found = scorer.score(hypotheses)
        assert found.cider == pytest.approx(official.cider, rel=1e-12)
        assert found.bleu_4 == pytest.approx(official.bleu_4, rel=1e-12)
        assert found.count == 1000
        assert found.distinct == len(set(hypotheses))


def test_captions_are_split_by_the_tokenizer_of_their_references() -> None:
    references = [["一只狗在跑。", "一只狗跑"], ["两只猫在睡", "两只猫。"]]
    hypotheses = ["一 只 狗 跑", "两 只 狗 在 睡"]
    scorer = ValidationScorer(references, CHARACTERS)
    official = score(
        dict(zip("12", hypotheses, strict=True)),
        dict(zip("12", references, strict=True)),
        tokenizer=CHARACTERS,
    )
    found = scorer.score(hypotheses)
    assert found.cider == pytest.approx(official.cider, rel=1e-12)
    assert found.bleu_4 == pytest.approx(official.bleu_4, rel=1e-12)
    # Whether spaces are between them or not, and with the signs that do not count.
    again = scorer.score(["一只狗跑！", "两只狗在睡。"])
    assert again.ciders.tolist() == found.ciders.tolist()


def make_decoder(vocab_size: int) -> CaptionDecoder:
    torch.manual_seed(0)
    decoder = CaptionDecoder(DecoderConfig(8, vocab_size, embedding_size=6, hidden_size=7))
    for parameter in decoder.parameters():
        parameter.data.mul_(4)
    return decoder


def test_a_decoder_is_scored_on_the_photos_that_have_captions(make_cache: MakeCache) -> None:
    cache = make_cache(CAPTIONS)
    vocabulary = build_vocabulary(cache.captions, 1)
    decoder = make_decoder(len(vocabulary)).train()
    validation = ValidationPhotos(cache)
    assert validation.rows.tolist() == [0, 1, 3]
    found = validation.score(decoder, vocabulary)
    assert decoder.training
    hypotheses = search(
        decoder.eval(),
        torch.from_numpy(np.array(cache.features[[0, 1, 3], 0])),
        SearchConfig(beam_size=1),
    )
    official = score(
        {str(i): vocabulary.decode(h.words) for i, h in enumerate(hypotheses)},
        {str(i): CAPTIONS[row] for i, row in enumerate((0, 1, 3))},
        java=False,
    )
    assert found.cider == pytest.approx(official.cider, rel=1e-12)
    assert found.bleu_4 == pytest.approx(official.bleu_4, rel=1e-12)
    assert ValidationPhotos(cache, rows=np.array([2, 3])).rows.tolist() == [3]


def test_the_mean_of_the_views_can_be_validated(make_cache: MakeCache) -> None:
    features = np.random.default_rng(1).standard_normal((4, 2, 8)).astype(np.float16)
    mean = features.astype(np.float32).mean(1)
    two = make_cache(CAPTIONS, features, "two.h5", views=("flip", "full"))
    vocabulary = build_vocabulary(two.captions, 1)
    decoder = make_decoder(len(vocabulary)).eval()
    for view, expected in (("full", features[:, 1]), ("mean", mean)):
        found = ValidationPhotos(two, view=view).captions(decoder, vocabulary)
        wanted = search(decoder, torch.from_numpy(expected[[0, 1, 3]]), SearchConfig(beam_size=1))
        assert found == [vocabulary.decode(h.words) for h in wanted]


def test_the_identity_tells_which_photos_are_validated_on(make_cache: MakeCache) -> None:
    cache = make_cache(CAPTIONS)
    first, other = (ValidationPhotos(cache, rows=np.array(rows)) for rows in ([0, 1], [0, 3]))
    assert first.is_recorded_as(first.identity)
    assert first.identity == ValidationPhotos(cache, rows=np.array([0, 1, 2])).identity
    assert not other.is_recorded_as(first.identity)
    # 0.1.0 recorded their number alone.
    of_0_1_0 = f"{cache.photos_sha256} {cache.captions_sha256} 2"
    assert first.is_recorded_as(of_0_1_0)
    assert other.is_recorded_as(of_0_1_0)
    assert not ValidationPhotos(cache).is_recorded_as(of_0_1_0)


def test_nothing_to_validate_on_is_said(make_cache: MakeCache) -> None:
    with pytest.raises(TrainingSetError, match="no captions of extracted photos to validate on"):
        ValidationPhotos(make_cache(CAPTIONS), rows=np.array([2]))
