from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from cache.record import CacheError
from cache.store import open_cache
from cache.writer import open_writer
from tests.conftest import MakeCache, skeleton
from train.captions.caption_set import TrainingSetError, _upload, begin_upload, caption_set
from train.captions.views import view_features
from train.captions.vocabulary import END, PAD, UNK, build_vocabulary

CPU = torch.device("cpu")
CAPTIONS = [["a dog runs", "dog"], [], ["a a a cat"]]


def test_a_batch_pairs_every_caption_with_its_own_photo(make_cache: MakeCache) -> None:
    cache = make_cache(CAPTIONS)
    vocabulary = build_vocabulary(cache.captions, min_count=1)
    captions = caption_set(cache, vocabulary, device=CPU, max_length=50)
    assert len(captions) == 3
    batch = captions.batch(np.array([1, 0, 2]))
    a, dog, runs, cat = (vocabulary.number(word) for word in ("a", "dog", "runs", "cat"))
    assert batch.targets.tolist() == [
        [a, a, a, cat, END],
        [a, dog, runs, END, PAD],
        [dog, END, PAD, PAD, PAD],
    ]
    assert batch.inputs.tolist() == [
        [a, a, a, cat],
        [a, dog, runs, PAD],
        [dog, PAD, PAD, PAD],
    ]
    expected = torch.from_numpy(np.array(cache.features[[2, 0, 0], 0]))
    assert torch.equal(batch.features, expected)


def test_two_sets_of_one_cache_can_share_its_features_on_the_device(
    make_cache: MakeCache,
) -> None:
    """On another device than the CPU, where both sets map the file itself."""
    cache, device = make_cache(CAPTIONS), torch.device("meta")
    vocabulary = build_vocabulary(cache.captions, min_count=1)
    first = caption_set(cache, vocabulary, rows=np.array([0]), device=device, max_length=50)
    second = caption_set(
        cache, vocabulary, rows=np.array([2]), device=device, max_length=50, features_from=first
    )
    assert second._device_features is first._device_features
    assert first._device_features is not None
    assert first._device_features.shape == cache.features.shape
    begun = begin_upload(cache, device)
    assert begun is not None
    third = caption_set(
        cache, vocabulary, rows=np.array([0]), device=device, max_length=50, features_from=begun
    )
    assert third._device_features is begun.result()
    assert begin_upload(cache, CPU) is None


def test_features_are_uploaded_in_parts_without_loss(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.captions.caption_set._UPLOAD_ROWS", 2)
    cache = make_cache(CAPTIONS, views=("flip", "full"))
    uploaded = _upload(cache, CPU)
    assert torch.equal(uploaded, torch.from_numpy(np.array(cache.features)))


def test_rare_words_become_unk_and_long_captions_are_cut(make_cache: MakeCache) -> None:
    cache = make_cache(CAPTIONS)
    vocabulary = build_vocabulary(cache.captions, min_count=2)
    a, dog = vocabulary.number("a"), vocabulary.number("dog")
    captions = caption_set(cache, vocabulary, device=CPU, max_length=3)
    assert captions.batch(np.array([2, 0])).targets.tolist() == [
        [a, a, a, END],
        [a, dog, UNK, END],
    ]


def test_unreadable_photos_are_never_trained_on(tmp_path: object, make_cache: MakeCache) -> None:
    made = make_cache(CAPTIONS, name="whole.h5")
    path = made.path.with_name("part.h5")
    with open_writer(path, skeleton(CAPTIONS), library_versions={}) as writer:
        writer.write(np.array([1, 2]), made.features[1:], made.digests[1:])
        writer.set_unreadable(0, "broken", made.digests[0])
    cache = open_cache(path)
    vocabulary = build_vocabulary(cache.captions, min_count=1)
    captions = caption_set(cache, vocabulary, device=CPU, max_length=50)
    assert captions.feature_rows.tolist() == [2]
    with pytest.raises(TrainingSetError, match="no captions of extracted photos"):
        caption_set(cache, vocabulary, rows=np.array([0, 1]), device=CPU, max_length=50)


def test_a_batch_shows_the_full_view_unless_given_others(
    make_cache: MakeCache,
) -> None:
    cache = make_cache(CAPTIONS, views=("flip", "full"))
    vocabulary = build_vocabulary(cache.captions, min_count=1)
    captions = caption_set(cache, vocabulary, device=CPU, max_length=50)
    batch = captions.batch(np.array([2]))
    assert torch.equal(batch.features, torch.from_numpy(np.array(cache.features[2:, 1])))
    batch = captions.batch(np.array([2]), np.array([0]))
    assert torch.equal(batch.features, torch.from_numpy(np.array(cache.features[2:, 0])))


def test_a_cache_that_is_cut_off_during_training_is_one_line(make_cache: MakeCache) -> None:
    """Reading its rows from the mapping would kill the process."""
    cache = make_cache(CAPTIONS, feature_dim=4096)
    vocabulary = build_vocabulary(cache.captions, min_count=1)
    captions = caption_set(cache, vocabulary, device=CPU, max_length=50)
    captions.batch(np.array([0]))
    os.truncate(cache.path, cache.path.stat().st_size // 2)
    for read in (
        lambda: captions.batch(np.array([0])),
        lambda: _upload(cache, CPU),
        lambda: view_features(cache, np.array([0]), "full"),
    ):
        with pytest.raises(CacheError, match=r"x\.h5: .* another program has cut it off"):
            read()
