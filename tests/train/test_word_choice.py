from __future__ import annotations

import pytest
import torch

from train.captions.vocabulary import END, PAD, START, UNK
from train.search.word_choice import draw, forbid, forbid_repeats, nucleus, top_k


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("width", [1, 7, 64, 129, 640, 1000, 5003])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_blocked_top_k_is_the_plain_one(width: int, k: int) -> None:
    k = min(k, width)
    values = torch.randn(20, width, generator=seeded())
    values[3, width // 2 :] = float("-inf")
    values[4] = float("-inf")
    top, place = top_k(values, k)
    expected = values.topk(k, dim=1)
    assert torch.equal(top, expected.values)
    assert torch.equal(values.gather(1, place), top)
    assert all(len(set(row)) == k for row in place.tolist())
    finite = expected.values > float("-inf")
    assert torch.equal(place[finite], expected.indices[finite])


def test_equal_values_are_found_once_each() -> None:
    values = torch.zeros(2, 1000)
    values[:, 200:230] = 1.0
    top, place = top_k(values, 6)
    assert top.eq(1).all()
    assert all(len(set(row)) == 6 for row in place.tolist())


def by_running_sum(weights: list[float], uniform: float) -> int:
    target, total = uniform * sum(weights), 0.0
    for place, weight in enumerate(weights):
        total += weight
        if total > target:
            return place
    raise AssertionError


@pytest.mark.parametrize("width", [1, 5, 64, 65, 1000])
def test_a_place_is_drawn_where_the_running_sum_says(width: int) -> None:
    # Sums of small integers are exact in any order.
    weights = torch.randint(0, 4, (200, width), generator=seeded()).float()
    weights[:, width // 2] += 1  # so that every row has a weight
    uniform = torch.rand(200, generator=seeded(1), dtype=torch.float64)
    uniform[0], uniform[1] = 0, 1 - 2**-53
    expected = [
        by_running_sum(w, u) for w, u in zip(weights.tolist(), uniform.tolist(), strict=True)
    ]
    assert draw(weights, uniform).tolist() == expected


def test_words_are_drawn_as_often_as_their_weights_say() -> None:
    weights = torch.zeros(1, 300)
    weights[0, 5], weights[0, 70], weights[0, 299] = 1, 2, 5
    places = draw(weights.expand(80_000, -1), torch.rand(80_000, generator=seeded()))
    shares = places.bincount(minlength=300) / 80_000
    assert shares[[5, 70, 299]].tolist() == pytest.approx([0.125, 0.25, 0.625], abs=0.01)
    assert shares[[5, 70, 299]].sum() == 1


@pytest.mark.parametrize("width", [4, 50, 3000])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_fewest_words_that_reach_the_share(width: int, top_p: float) -> None:
    weights = torch.rand(10, width, generator=seeded(), dtype=torch.float64) ** 8
    for row, kept in zip(weights, nucleus(weights, top_p), strict=True):
        inside = kept > 0
        assert torch.equal(kept[inside], row[inside])
        assert float(kept.sum()) >= top_p * float(row.sum())
        assert float(kept.sum() - kept[inside].min()) < top_p * float(row.sum())
        assert all(row[~inside] <= kept[inside].min())


def test_special_words_and_empty_captions_are_forbidden() -> None:
    logits = torch.zeros(1, 6)
    forbid(logits, 0, 3)
    assert logits.isinf().nonzero()[:, 1].tolist() == [PAD, START, END, UNK]
    logits = torch.zeros(1, 6)
    forbid(logits, 1, 3)
    assert logits.isinf().nonzero()[:, 1].tolist() == [PAD, START, UNK]
    logits = torch.zeros(1, 6)
    forbid(logits, 3, 3)
    assert logits.isfinite().nonzero()[:, 1].tolist() == [END]


def test_what_would_repeat_an_ngram_is_forbidden() -> None:
    words = torch.tensor([[4, 5, 6, 4, 5], [4, 4, 4, 4, 4], [4, 5, 6, 7, 8]])

    def forbidden(n: int) -> list[list[int]]:
        logits = torch.zeros(3, 9)
        forbid_repeats(logits, words, n)
        return [[w for w in row.isinf().nonzero().flatten().tolist() if w != PAD] for row in logits]

    assert forbidden(0) == [[], [], []]
    assert forbidden(1) == [[4, 5, 6], [4], [4, 5, 6, 7, 8]]
    assert forbidden(2) == [[6], [4], []]
    assert forbidden(3) == [[6], [4], []]
    assert forbidden(4) == [[], [4], []]
    assert forbidden(5) == [[], [4], []]
    assert forbidden(6) == [[], [], []]
