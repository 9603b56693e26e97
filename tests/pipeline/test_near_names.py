"""A name that is not quite right is told the right one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer
from torchvision import models

from pipeline.cli.app import app
from pipeline.cli.arguments.names import _ALIASES, near_options
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.known_backbones import KNOWN_BACKBONES
from pipeline.encoder.networks.torchvision_networks import headless_network
from tests.pipeline.test_cli import cap
from train.option import nearest, or_list

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[tuple[str, ...], Any] = {
    **{(name,): command for name, command in GROUP.commands.items() if name != "bench"},
    **{("bench", name): command for name, command in GROUP.commands["bench"].commands.items()},
}


def long_options(command: Any) -> list[str]:
    return [name for parameter in command.params for name in parameter.opts if name[:2] == "--"]


def misspelt(option: str) -> list[str]:
    """With a letter left out, doubled, replaced, or exchanged with the next one."""
    middle = 2 + (len(option) - 2) // 2
    start, letter, rest = option[:middle], option[middle], option[middle + 1 :]
    return [
        start + rest,
        start + 2 * letter + rest,
        f"{start}{'x' if letter != 'x' else 'y'}{rest}",
        f"{start}{rest[:1]}{letter}{rest[1:]}",
        option[:-1],
        option + "s",
    ]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_misspelt_by_one_letter_is_told_its_name(words: tuple[str, ...]) -> None:
    known = long_options(COMMANDS[words])
    assert known
    for option in known:
        for typed in misspelt(option):
            if typed in known:  # two that differ by a letter, or a letter exchanged with its like
                continue
            assert option in near_options(typed, known), typed
        typed = misspelt(option)[0]
        if typed not in known:
            _, err = cap(*words, typed, code=2)
            assert f"Error: No such option: {typed}. Did you mean {option}" in err
            assert "Invalid value" not in err


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        ("train --lr 1", "--learning-rate"),
        ("train --bs=4", "--batch-size"),
        ("train --hidden_size 4", "--hidden-size"),
        ("extract-features --arch x", "--backbone"),
        ("extract-features --num-workers 3", "--workers"),
        ("extract-features -o x", "--out"),
        ("predict a.jpg --checkpoint x", "--model"),
        ("predict a.jpg --num_beams 3", "--beam-size"),
        ("evaluate --ckpt x", "--model"),
        ("bench extract --arch x", "--backbone"),
    ],
)
def test_other_programs_names_are_known(told: str, meant: str) -> None:
    _, err = cap(*told.split(), code=2)
    assert f"Did you mean {meant}" in err


def test_names_of_others_stand_for_options_that_exist() -> None:
    ours = {option for command in COMMANDS.values() for option in long_options(command)}
    ours |= set(long_options(GROUP)) | {"--help"}
    assert {f"--{name}" for names in _ALIASES.values() for name in names} <= ours


def test_what_is_near_to_nothing_is_told_nothing() -> None:
    _, err = cap("train", "--zzz", code=2)
    assert err.rstrip().endswith("No such option: --zzz")


def test_the_nearest_words_come_first() -> None:
    assert nearest("resnet15", ["resnet18", "resnet152", "vgg16"]) == ["resnet152", "resnet18"]
    assert nearest("VIT", ["vit_b_16", "vit_b_32", "vgg16"]) == ["vit_b_16", "vit_b_32"]
    assert nearest("zzz", ["vgg16"]) == []
    assert or_list(["a"]) == "a"
    assert or_list(["a", "b", "c"]) == "a, b or c"


def test_a_backbone_that_does_not_exist_is_told_near_ones() -> None:
    with pytest.raises(EncoderError, match="no backbone 'vit'; did you mean vit_b_16, vit_b_32 or"):
        headless_network("vit", "meta")
    with pytest.raises(EncoderError, match=r"no backbone 'zzz'; `cap backbones` lists them$"):
        headless_network("zzz", "meta")


def test_the_table_of_backbones_is_torchvisions() -> None:
    for known in KNOWN_BACKBONES:
        published = models.get_model_weights(known.name)
        # FEATURES lack the layers that the features come from: docs/backbones.md.
        left_out = ("DEFAULT", "IMAGENET1K_FEATURES")
        names = tuple(name for name in published.__members__ if name not in left_out)
        assert known.weights == names
        facts = published[names[0]].meta
        assert known.size_mb == round(facts["_file_size"])
        assert known.top_1 == round(facts["_metrics"]["ImageNet-1K"]["acc@1"], 1)
    assert [known.name for known in KNOWN_BACKBONES] == models.list_models(module=models)


@pytest.mark.parametrize(
    "name", ["alexnet", "mobilenet_v3_small", "resnet152", "squeezenet1_1", "vit_b_16"]
)
def test_the_table_has_the_number_of_features(name: str) -> None:
    (known,) = (known for known in KNOWN_BACKBONES if known.name == name)
    assert known.features == headless_network(name, "meta").feature_dim


def test_backbones_are_listed_with_what_they_cost() -> None:
    out, _ = cap("backbones")
    header, *lines = out.splitlines()
    assert header.split() == ["backbone", "features", "download", "top-1", "weights"]
    (line,) = (line for line in lines if line.startswith("resnet152 "))
    assert " ".join(line.split()) == "resnet152 2048 230 MB 78.3 IMAGENET1K_V1, IMAGENET1K_V2"
    found = json.loads(cap("backbones", "--json")[0])
    assert len(found) == len(lines)
    assert found[0] == {
        "name": "alexnet",
        "features": 4096,
        "size_mb": 233,
        "top_1": 56.5,
        "weights": ["IMAGENET1K_V1"],
    }
