from __future__ import annotations

import pytest

from train.scores.human_agreement import human_agreement
from train.scores.metrics import MetricsError, score

REFERENCES = {
    "1": ["a dog runs on grass", "the dog is running", "a brown dog"],
    "2": ["two cats sleep", "cats sleeping on a red bed"],
    "3": ["a man rides a horse", "a horse and a man", "a man on a horse"],
}


def test_every_caption_is_scored_against_the_others_of_its_photo() -> None:
    rounds = [
        score(
            {"1": one[i], "2": two[i % 2], "3": three[i]},
            {"1": one[:i] + one[i + 1 :], "2": [two[1 - i % 2]], "3": three[:i] + three[i + 1 :]},
            java=False,
        )
        for i in range(3)
        for one, two, three in [REFERENCES.values()]
    ]
    found = human_agreement(REFERENCES | {"4": ["alone"]}, java=False)
    assert found.scores.keys() == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}
    for name, value in found.scores.items():
        assert value == pytest.approx(sum(getattr(r, name) for r in rounds) / 3), name
    assert (found.photos, found.rounds) == (3, 3)
    assert found.references == pytest.approx((2 + 1 + 2) / 3)


@pytest.mark.usefixtures("small_meteor")
def test_people_who_agree_score_full_marks() -> None:
    found = human_agreement({"1": ["a dog runs fast"] * 6, "2": ["two cats sleep now"] * 6})
    assert found.scores["bleu_4"] == pytest.approx(1)
    assert found.rounds == 5


def test_one_caption_a_photo_is_too_few() -> None:
    with pytest.raises(MetricsError, match="no photo has two captions"):
        human_agreement({"1": ["a"], "2": []})
