from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cache.store import FeatureCache
from tests.conftest import MakeCache
from train.captions.photo_split import (
    SplitError,
    count_copies,
    count_copies_of,
    may_be_equal,
    split_by_list,
    split_photos,
)

ONE = [["a dog"]]
OF_0_1_0 = [0, 3, 4]  # held out by 0.1.0 of twelve photos, with a share of 0.25 and seed 0


def digests(*numbers: int) -> NDArray[np.uint8]:
    return np.repeat(np.array(numbers, np.uint8)[:, None], 16, 1)


def held_out_ids(cache: FeatureCache, share: float, seed: int = 0) -> set[str]:
    _, held_out = split_photos(cache, held_out=share, seed=seed)
    return {cache.image_ids[row] for row in held_out.tolist()}


def test_held_out_photos_take_all_their_captions_along(make_cache: MakeCache) -> None:
    cache = make_cache([["a dog", "the dog"]] * 40 + [[]] * 10)
    rows, held_out = split_photos(cache, held_out=0.25, seed=0)
    assert len(held_out) == 10
    assert sorted([*rows, *held_out]) == list(range(40))
    again, _ = split_photos(cache, held_out=0.25, seed=0)
    other, _ = split_photos(cache, held_out=0.25, seed=1)
    assert np.array_equal(rows, again)
    assert not np.array_equal(rows, other)


@pytest.mark.parametrize("seed", range(5))
def test_copies_stay_on_one_side(make_cache: MakeCache, seed: int) -> None:
    numbers = [*range(1, 61)] * 2
    cache = make_cache(ONE * 120, digests=numbers)
    rows, held_out = split_photos(cache, held_out=0.05, seed=seed)
    assert len(rows) == 114
    assert len(held_out) == 6
    on_both = {numbers[row] for row in rows} & {numbers[row] for row in held_out}
    assert not on_both


@pytest.mark.parametrize("seed", range(5))
def test_photos_with_one_id_stay_on_one_side_wherever_the_cut_falls(
    make_cache: MakeCache, seed: int
) -> None:
    ids = [str(n // 3) for n in range(30)]
    cache = make_cache(ONE * 30, ids=ids)
    for count in range(1, 30):
        rows, held_out = split_photos(cache, held_out=count / 30, seed=seed)
        assert len(held_out) == max(3, count // 3 * 3)
        assert not {ids[row] for row in rows} & {ids[row] for row in held_out}


def test_copies_of_photos_with_one_id_stay_together(make_cache: MakeCache) -> None:
    # 0 is a copy of 2, which has the id of 1, which is a copy of 3.
    cache = make_cache(ONE * 8, ids=["a", "b", "b", *"cdefg"], digests=[1, 2, 1, 2, 3, 4, 5, 6])
    for seed in range(20):
        _, held_out = split_photos(cache, held_out=0.5, seed=seed)
        assert len(held_out) == 4
        assert len({0, 1, 2, 3} & set(held_out.tolist())) in (0, 4)


def test_the_order_of_the_photos_does_not_matter(make_cache: MakeCache) -> None:
    ids, numbers = [f"p{n}" for n in range(40)], [n % 25 + 1 for n in range(40)]
    cache = make_cache(ONE * 40, ids=ids, digests=numbers)
    order = np.random.default_rng(0).permutation(40).tolist()
    shuffled = make_cache(
        ONE * 40,
        name="y.h5",
        ids=[ids[n] for n in order],
        digests=[numbers[n] for n in order],
    )
    assert held_out_ids(shuffled, 0.3) == held_out_ids(cache, 0.3)


def test_unknown_digests_are_not_equal(make_cache: MakeCache) -> None:
    unknown = make_cache(ONE * 12)
    known = make_cache(ONE * 12, name="y.h5", digests=range(1, 13))
    for cache in (unknown, known):
        _, held_out = split_photos(cache, held_out=0.25, seed=0)
        assert held_out.tolist() == OF_0_1_0


def test_copies_can_be_ignored_as_0_1_0_did(make_cache: MakeCache) -> None:
    cache = make_cache(ONE * 12, digests=[1] * 12)
    _, held_out = split_photos(cache, held_out=0.25, seed=0, split_copies=True)
    assert held_out.tolist() == OF_0_1_0


def test_groups_larger_than_the_share(make_cache: MakeCache) -> None:
    two_groups = make_cache(ONE * 9, digests=[1] * 5 + [2] * 4)
    rows, held_out = split_photos(two_groups, held_out=0.1, seed=0)
    assert rows.tolist() == [0, 1, 2, 3, 4]
    assert held_out.tolist() == [5, 6, 7, 8]
    one_group = make_cache(ONE * 4, name="y.h5", digests=[1] * 4)
    rows, held_out = split_photos(one_group, held_out=0.5, seed=0)
    assert rows.tolist() == [0, 1, 2, 3]
    assert not len(held_out)
    rows, held_out = split_photos(make_cache([[]], name="z.h5"), held_out=0.5, seed=0)
    assert not len(rows)
    assert not len(held_out)


def of_list(cache: FeatureCache, names: Path, text: str) -> tuple[list[int], list[int]]:
    names.write_text(text, encoding="utf-8")
    training, validation = split_by_list(cache, names)
    return training.tolist(), validation.tolist()


def test_listed_photos_validate_and_the_others_train(make_cache: MakeCache, tmp_path: Path) -> None:
    paths = ["a/1.jpg", "a/2.jpg", "b/1.jpg", "3.jpg", "no captions.jpg"]
    cache = make_cache([*ONE * 4, []], paths=paths)
    names = tmp_path / "val.txt"
    assert of_list(cache, names, "a/1.jpg\n") == ([1, 2, 3], [0])
    assert of_list(cache, names, "1.jpg\r\n") == ([1, 3], [0, 2])
    assert of_list(cache, names, "\ufeff3.jpg\n\nno captions.jpg") == ([0, 1, 2], [3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0000.jpg\nx.jpg\ny.jpg\n", r"2 of 3 names are not among the photos .*\(first: x\.jpg\)"),
        ("", "names none of the 2 photos with captions"),
        ("0000.jpg\n0001.jpg\n", "names all of the 2 photos with captions"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(
    make_cache: MakeCache, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(SplitError, match=rf"val\.txt: {message}"):
        of_list(make_cache(ONE * 2), tmp_path / "val.txt", text)
    with pytest.raises(SplitError, match=r"absent: cannot read \(No such file"):
        split_by_list(make_cache(ONE * 2, name="y.h5"), tmp_path / "absent")


def test_copies_are_counted() -> None:
    assert count_copies(digests(1, 2, 1, 1, 0, 0, 3)) == 2
    assert count_copies(digests(0, 0)) == 0
    assert count_copies_of(digests(1, 2, 0), digests(2, 2, 0, 3)) == 2
    ends_in_zeros = digests(1, 1)
    ends_in_zeros[1, 8:] = 0
    assert count_copies(ends_in_zeros) == 0


def test_photos_are_compared_where_their_digests_are_known() -> None:
    assert may_be_equal(digests(1, 0, 3), digests(1, 2, 0))
    assert not may_be_equal(digests(1, 0, 3), digests(1, 2, 4))
