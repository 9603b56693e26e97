from __future__ import annotations

import pytest

from train.captions.script import CHARACTERS, TREEBANK, WHITESPACE, misfit, script_of

CHINESE = ["一只狗在草地上奔跑。", "两个男人骑着BMX自行车"]
JAPANESE = ["犬が草原を走っている。", "人々は公園にいる"]
THAI = ["ผู้ชายขี่จักรยานบนถนน"]


@pytest.mark.parametrize(
    ("captions", "script"),
    [
        (["A dog runs.", "ein Häschen"], "Latin"),
        (["Собака бежит"], "Cyrillic"),
        (["एक कुत्ता दौड़ रहा है।"], "Devanagari"),
        (["한 남자가 자전거를 탄다"], "Hangul"),
        (CHINESE, "Chinese"),
        (JAPANESE, "Japanese"),
        (["ﾆﾎﾝ"], "Japanese"),
        (THAI, "Thai"),
        (["A man with a 太極 shirt"], "Latin"),
        (["12 .", ""], None),
        ([], None),
        ([""] * 2500 + CHINESE * 2500, "Chinese"),
    ],
)
def test_the_script_is_that_of_most_letters(captions: list[str], script: str | None) -> None:
    assert script_of(captions) == script


@pytest.mark.parametrize("tokenizer", [TREEBANK, WHITESPACE])
@pytest.mark.parametrize("captions", [CHINESE, JAPANESE, THAI, ["បុរសម្នាក់ជិះកង់"]])
def test_sentences_without_spaces_need_characters(captions: list[str], tokenizer: str) -> None:
    told = misfit(captions, tokenizer)
    assert told is not None
    assert told.startswith(f"the captions are in {script_of(captions)}, without spaces")
    assert f"--tokenizer {tokenizer} makes one word of a sentence" in told
    assert told.endswith("use --tokenizer characters")
    assert misfit(captions, CHARACTERS) is None


@pytest.mark.parametrize(
    "captions",
    [
        ["A dog runs on the green grass."],
        ["한 남자가 자전거를 탄다"],
        ["एक कुत्ता दौड़ रहा है।"],
        ["A man with a 中文中文中文 shirt"],
        ["一 只 狗 在 草地 上 奔跑 。", "两 个 男人 骑着 自行车"],  # separated before
        ["一　只　狗　在　草地　上　奔跑"],  # by wide spaces
        ["ผู้ชาย ขี่ จักรยาน บน ถนน"],
        [],
    ],
)
def test_words_between_spaces_are_words(captions: list[str]) -> None:
    assert misfit(captions, TREEBANK) is None
