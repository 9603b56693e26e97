from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from train.captions.vocabulary import END, PAD, START, UNK
from train.config import SearchConfig, SearchError
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.option import SettingError
from train.search.beam import beam_search
from train.search.hypotheses import Hypothesis, search, search_several

WORDS = 8  # the four special ones and four real words


def decoder(seed: int, scale: float = 3.0) -> CaptionDecoder:
    """A random decoder whose large weights make probabilities uneven."""
    torch.manual_seed(seed)
    made = CaptionDecoder(DecoderConfig(3, WORDS, embedding_size=4, hidden_size=5)).eval()
    for parameter in made.parameters():
        parameter.data.mul_(scale)
    made.head.bias.data[END] -= 4 * (seed % 4)  # so that short and long captions are among the best
    return made


def features(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)).half()


def all_captions(
    model: CaptionDecoder, photo: torch.Tensor, config: SearchConfig
) -> list[Hypothesis]:
    """All captions of up to `max_length` words, each scored as a whole, best first."""
    found: list[Hypothesis] = []
    for length in range(1, config.longest + 1):
        words = torch.tensor(list(itertools.product(range(4, WORDS), repeat=length)))
        with torch.no_grad():
            log_probs = model(photo.expand(len(words), -1), words).log_softmax(-1)
        targets = torch.nn.functional.pad(words, (0, 1), value=END)
        totals = log_probs.gather(2, targets.unsqueeze(-1)).sum((1, 2))
        scores = (totals / (length + 1) ** config.length_penalty).tolist()
        found.extend(Hypothesis(tuple(w), s) for w, s in zip(words.tolist(), scores, strict=True))
    return sorted(found, key=lambda h: -h.score)


def test_a_wide_beam_finds_what_exhaustive_search_finds() -> None:
    lengths = set()
    for seed, length_penalty in itertools.product(range(6), (0.0, 0.7, 1.0)):
        config = SearchConfig(400, max_length=4, length_penalty=length_penalty, no_repeat_ngram=0)
        model, photos = decoder(seed), features(3, seed)
        for photo, found in zip(photos, search(model, photos, config), strict=True):
            expected = all_captions(model, photo, config)[0]
            assert found.words == expected.words
            assert found.score == pytest.approx(expected.score, abs=1e-4)
            lengths.add(len(found.words))
    assert len(lengths) > 2


def greedy_by_hand(model: CaptionDecoder, photo: torch.Tensor, max_length: int) -> tuple[int, ...]:
    words: list[int] = []
    while len(words) < max_length:
        with torch.no_grad():
            logits = model(photo.unsqueeze(0), torch.tensor([words], dtype=torch.int64))[0, -1]
        logits[[PAD, START, UNK] if words else [PAD, START, UNK, END]] = float("-inf")
        word = int(logits.argmax())
        if word == END:
            break
        words.append(word)
    return tuple(words)


def test_greedy_takes_the_likeliest_word_at_every_step() -> None:
    config = SearchConfig(beam_size=1, max_length=6, no_repeat_ngram=0)
    for seed in range(5):
        model, photos = decoder(seed), features(4, seed)
        found = search(model, photos, config)
        assert [h.words for h in found] == [greedy_by_hand(model, p, 6) for p in photos]


def test_a_beam_of_one_is_greedy() -> None:
    config = SearchConfig(beam_size=1, max_length=6, no_repeat_ngram=0)
    for seed in range(8):
        model, photos = decoder(seed), features(16, seed)
        with torch.inference_mode():
            by_beam = beam_search(model, photos, config)
        for h, words, score in zip(
            search(model, photos, config),
            by_beam.words[:, 0, 0].tolist(),
            by_beam.scores[:, 0, 0].tolist(),
            strict=True,
        ):
            assert words[: len(h.words) + 1] == [*h.words, END]
            assert h.score == pytest.approx(score, abs=1e-5)


def test_photos_do_not_influence_one_another() -> None:
    model, photos = decoder(3), features(9)
    config = SearchConfig(beam_size=3, max_length=6)
    together = search(model, photos, config)
    alone = [search(model, photo.unsqueeze(0), config)[0] for photo in photos]
    in_chunks = search(model, photos, config, batch_size=2)
    assert [h.words for h in together] == [h.words for h in alone]
    assert [h.words for h in together] == [h.words for h in in_chunks]


@pytest.mark.parametrize("beam_size", [1, 2, 5, 50])
def test_a_caption_always_comes_back_without_special_words(beam_size: int) -> None:
    model = decoder(0)
    model.head.bias.data[END] = -1000.0  # never wants to end
    model.head.bias.data[UNK] = 10.0  # always wants <unk>
    config = SearchConfig(beam_size=beam_size, max_length=7)
    for found in search(model, features(4), config):
        assert len(found.words) == 7
        assert not {PAD, START, END, UNK} & set(found.words)
        assert found.score > float("-inf")
    model.head.bias.data[END] = 2000.0  # ends at once
    assert [len(h.words) for h in search(model, features(4), config)] == [1] * 4
    assert search(model, features(0), config) == []


CONFIGS = [
    SearchConfig(beam_size=1, max_length=6),
    SearchConfig(beam_size=4, max_length=6, captions=3),
    SearchConfig(beam_size=6, max_length=6, captions=4, groups=3, diversity=1.0),
    SearchConfig(beam_size=3, max_length=6, no_repeat_ngram=2),
    SearchConfig(sample=True, max_length=6, captions=3, top_p=0.8, temperature=1.3),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_log_probabilities_are_the_decoders(config: SearchConfig) -> None:
    for seed in range(4):
        model, photos = decoder(seed), features(5, seed)
        for photo, found in zip(photos, search_several(model, photos, config), strict=True):
            assert found
            for h in found:
                words = torch.tensor([h.words])
                with torch.no_grad():
                    log_probs = model(photo.unsqueeze(0), words).log_softmax(-1)[0]
                expected = log_probs.gather(1, torch.tensor([*h.words, END]).unsqueeze(1))
                assert h.log_probs == pytest.approx(expected.flatten().tolist(), abs=1e-4)
                total = sum(h.log_probs) / (len(h.words) + 1) ** config.length_penalty
                assert h.score == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_other_captions_of_the_search_leave_the_first_ones_alone(config: SearchConfig) -> None:
    more = 0
    for seed in range(4):
        model, photos = decoder(seed), features(5, seed)
        alone = search_several(model, photos, config)
        for first, found in zip(
            alone, search_several(model, photos, config, others=3), strict=True
        ):
            assert found[: len(first)] == first
            others = found[len(first) :]
            assert len(others) <= 3
            assert [h.score for h in others] == sorted((h.score for h in others), reverse=True)
            if not config.sample:
                assert len({h.words for h in found}) == len(found)
            for h in others:
                words = torch.tensor([h.words])
                with torch.no_grad():
                    log_probs = model(photos[alone.index(first)].unsqueeze(0), words)
                expected = log_probs.log_softmax(-1)[0].gather(
                    1, torch.tensor([*h.words, END]).unsqueeze(1)
                )
                assert h.log_probs == pytest.approx(expected.flatten().tolist(), abs=1e-4)
            more += len(others)
    assert (more > 0) == (not config.sample and config.beam_size > 1)


def test_the_search_goes_on_no_longer_for_other_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = CaptionDecoder.step

    def counted(self: CaptionDecoder, inputs: torch.Tensor, state: Any) -> Any:
        steps[-1] += len(inputs)
        return step(self, inputs, state)

    monkeypatch.setattr(CaptionDecoder, "step", counted)
    config = SearchConfig(3, max_length=20, length_penalty=0.0)
    for seed in range(8):
        model, photos = decoder(seed), features(8, seed)
        for others in (0, 2):
            steps.append(0)
            search_several(model, photos, config, others=others)
    assert steps[::2] == steps[1::2]
    assert min(steps) < max(steps)  # some searches end early


def test_several_captions_are_the_best_of_all() -> None:
    for seed, length_penalty in itertools.product(range(4), (0.0, 0.7, 1.0)):
        config = SearchConfig(
            400, max_length=4, length_penalty=length_penalty, captions=20, no_repeat_ngram=0
        )
        model, photos = decoder(seed), features(2, seed)
        for photo, found in zip(photos, search_several(model, photos, config), strict=True):
            expected = all_captions(model, photo, config)[:20]
            assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-4)
            assert {h.words for h in found} == {h.words for h in expected}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_ngram_is_said_twice(n: int) -> None:
    model = decoder(2)
    model.head.bias.data[END] = -8.0  # long captions of four different words repeat some
    photos = features(6)
    for changes in ({"beam_size": 1}, {"beam_size": 3}, {"sample": True}):
        config = SearchConfig(**{"max_length": 9, "no_repeat_ngram": n} | changes)  # type: ignore[arg-type]
        for found in search(model, photos, config):
            grams = [found.words[i : i + n] for i in range(len(found.words) - n + 1)]
            assert len(set(grams)) == len(grams)
    plain = search(model, photos, SearchConfig(beam_size=3, max_length=9, no_repeat_ngram=0))
    assert any(len(set(h.words)) < len(h.words) for h in plain)


def test_a_blocked_beam_finds_the_best_caption_without_repeats() -> None:
    config = SearchConfig(beam_size=400, max_length=4, no_repeat_ngram=1)
    for seed in range(4):
        model, photos = decoder(seed), features(2, seed)
        for photo, found in zip(photos, search(model, photos, config), strict=True):
            fresh = (
                h for h in all_captions(model, photo, config) if len({*h.words}) == len(h.words)
            )
            assert found.words == next(fresh).words


def diverse_by_hand(
    model: CaptionDecoder, photo: torch.Tensor, config: SearchConfig
) -> list[Hypothesis]:
    """Diverse beam search with one beam per group, group by group and word by word."""
    groups = [Hypothesis((), 0.0) for _ in range(config.groups)]
    best: list[Hypothesis] = [Hypothesis((), float("-inf"))] * config.groups
    done = [False] * config.groups
    for length in range(config.longest + 1):
        said: list[int] = []
        for g, group in enumerate(groups):
            if done[g]:
                continue
            with torch.no_grad():
                words = torch.tensor([group.words], dtype=torch.int64)
                logs = model(photo.unsqueeze(0), words)[0, -1].log_softmax(-1).tolist()
            allowed = [END] if length == config.longest else [*range(4, WORDS)]
            if 0 < length < config.longest:
                allowed.append(END)
            cost = {word: config.diversity * said.count(word) for word in allowed}
            order = sorted(allowed, key=lambda word: cost[word] - logs[word])
            if order[0] == END:
                best[g] = Hypothesis(
                    group.words, (group.score + logs[END]) / (length + 1) ** config.length_penalty
                )
                done[g] = True
                continue
            said.append(order[0])
            groups[g] = Hypothesis((*group.words, order[0]), group.score + logs[order[0]])
    return best


def test_diverse_groups_avoid_one_anothers_words() -> None:
    for seed in range(6):
        model, photos = decoder(seed), features(4, seed)
        config = SearchConfig(
            4, max_length=5, groups=4, captions=4, diversity=2.0, no_repeat_ngram=0
        )
        for photo, found in zip(photos, search_several(model, photos, config), strict=True):
            expected = {h.words: h.score for h in diverse_by_hand(model, photo, config)}
            scores = {h.words: h.score for h in found}
            assert len(scores) == 4
            # Equal captions of several groups are replaced by others.
            assert {words: scores[words] for words in expected} == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("captions", "groups"), [(5, 5), (6, 3), (3, 3)])
def test_groups_give_as_many_different_captions_as_were_asked_for(
    captions: int, groups: int
) -> None:
    config = SearchConfig(captions, max_length=6, captions=captions, groups=groups, diversity=0.0)
    for seed in range(4):
        model, photos = decoder(seed), features(6, seed)
        first = search(model, photos, SearchConfig(captions // groups, max_length=6))
        for photo, found, best in zip(
            photos, search_several(model, photos, config), first, strict=True
        ):
            # Without a cost of diversity all groups find the same captions.
            assert len({h.words for h in found}) == captions
            assert best.words in {h.words for h in found}
            alone = search_several(model, photo.unsqueeze(0), config)[0]
            assert [h.words for h in alone] == [h.words for h in found]


def test_without_a_cost_every_group_is_the_plain_beam() -> None:
    model, photos = decoder(1), features(5)
    plain = search_several(model, photos, SearchConfig(3, max_length=6, captions=3))
    config = SearchConfig(6, max_length=6, captions=3, groups=2, diversity=0.0)
    grouped = search_several(model, photos, config)
    assert [[h.words for h in found] for found in grouped] == [
        [h.words for h in found] for found in plain
    ]


def test_the_first_group_is_the_plain_beam() -> None:
    model, photos = decoder(1), features(5)
    plain = search(model, photos, SearchConfig(2, max_length=6))
    config = SearchConfig(8, max_length=6, captions=8, groups=4, diversity=1.5)
    diverse = search_several(model, photos, config)
    assert all(
        h.words in {other.words for other in found} for h, found in zip(plain, diverse, strict=True)
    )
    assert all(len({h.words for h in found}) == len(found) for found in diverse)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_batch_changes_nothing(config: SearchConfig) -> None:
    model, photos = decoder(3), features(9)
    together = search_several(model, photos, config)
    for size in (1, 2, 4):
        parts = search_several(model, photos, config, batch_size=size)
        assert [[h.words for h in f] for f in parts] == [[h.words for h in f] for f in together]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beam_size": 5, "groups": 2}, "5 beams cannot be shared by 2 groups equally"),
        ({"beam_size": 3, "captions": 4}, "4 captions of each photo need as many beams, not 3"),
        ({"sample": True, "top_p": 1.5}, "top-p 1.5 must be above 0 and at most 1"),
        ({"sample": True, "top_p": float("nan")}, "top p nan is not a number"),
        *(
            ({"sample": True, "temperature": float(wrong)}, f"temperature {wrong}")
            for wrong in ("nan", "inf", "1e-40", "0.0", "-1.0")
        ),
        ({"temperature": 0.7}, "--temperature has no effect without --sample"),
        ({"top_p": 0.9}, "--top-p has no effect without --sample"),
        ({"seed": 1}, "--seed has no effect without --sample"),
        ({"sample": True, "beam_size": 5}, "--beam-size has no effect on --sample"),
        ({"diversity": 1.0}, "--diversity has no effect on one group"),
        ({"diversity": float("inf")}, "diversity inf must be at most 1000"),
        ({"length_penalty": 1e4}, "length penalty 10000.0 must be at most 10"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises((SearchError, SettingError), match=message):
        search(decoder(0), features(1), SearchConfig(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1e-4, 1e4])
def test_the_lowest_and_the_highest_temperature_draw_words(temperature: float) -> None:
    model, photos = decoder(0), features(4)
    config = SearchConfig(sample=True, temperature=temperature, captions=5, max_length=6)
    found = [h.words for captions in search_several(model, photos, config) for h in captions]
    if temperature < 1:  # as good as greedy search
        greedy = search(model, photos, SearchConfig(beam_size=1, max_length=6))
        assert found == [h.words for h in greedy for _ in range(5)]
    else:  # all four words alike
        assert {words[0] for words in found} == {4, 5, 6, 7}


def test_a_tiny_vocabulary_gives_what_captions_there_are() -> None:
    torch.manual_seed(0)
    model = CaptionDecoder(DecoderConfig(3, 5, embedding_size=4, hidden_size=5)).eval()
    config = SearchConfig(beam_size=6, captions=6, max_length=3)
    for found in search_several(model, features(2), config):
        assert sorted(h.words for h in found) == [(4,), (4, 4), (4, 4, 4)]
