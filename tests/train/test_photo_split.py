from __future__ import annotations

import numpy as np

from tests.conftest import MakeCache
from train.captions.photo_split import split_photos


def test_held_out_photos_take_all_their_captions_along(make_cache: MakeCache) -> None:
    cache = make_cache([["a dog", "the dog"]] * 40 + [[]] * 10)
    rows, held_out = split_photos(cache, held_out=0.25, seed=0)
    assert len(held_out) == 10
    assert sorted([*rows, *held_out]) == list(range(40))
    again, _ = split_photos(cache, held_out=0.25, seed=0)
    other, _ = split_photos(cache, held_out=0.25, seed=1)
    assert np.array_equal(rows, again)
    assert not np.array_equal(rows, other)
