"""Options come from the settings: each has help, the field's default, bounds and choices."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pipeline.cli.app import app
from pipeline.cli.options import options
from pipeline.demo.config import DemoConfig
from pipeline.encoder.encoder import DTYPES
from pipeline.extraction.config import PRECISIONS, ExtractOptions
from tests.conftest import ROOT
from tests.pipeline.test_cli import cap
from train.config import BEST, CLASSIC, RECIPES, Recipe, SearchConfig, SweepConfig, TrainConfig
from train.option import SettingError, about, described, option

GROUP: Any = typer.main.get_command(app)
# The settings of each command, and how little it must be told.
COMMANDS: list[tuple[str, type, list[str]]] = [
    ("extract-features", ExtractOptions, ["--images", ".", "--out", "x.h5"]),
    ("train", TrainConfig, ["--from-cache", "x.h5", "--out", "x"]),
    ("train", Recipe, ["--from-cache", "x.h5", "--out", "x"]),
    ("sweep", SweepConfig, ["--from-cache", "x.h5", "--out", "x"]),
    ("evaluate", SearchConfig, ["--model", "x", "--cache", "x.h5"]),
    ("predict", SearchConfig, ["a.jpg", "--model", "x"]),
    ("demo", DemoConfig, []),
]


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def parameters(command: str) -> dict[str, Any]:
    return {parameter.name: parameter for parameter in GROUP.commands[command].params}


def test_every_part_of_a_recipe_is_an_option_that_shows_each_recipes_value() -> None:
    shown = parameters("train")
    text = " ".join(cap("train", "--help")[0].split())
    for setting in dataclasses.fields(Recipe):
        assert shown[setting.name].default is None
        assert f" {flag(setting.name)} " in text
        best, classic = (getattr(recipe, setting.name) for recipe in (BEST, CLASSIC))
        if isinstance(best, bool):
            best, classic = ("yes" if value else "no" for value in (best, classic))
        best = "by the data" if best is None else best
        assert f"[best: {best}, classic: {classic}]" in shown[setting.name].help


@pytest.mark.parametrize(("command", "config", "told"), COMMANDS)
def test_options_have_the_help_and_the_default_of_their_field(
    command: str, config: type, told: list[str]
) -> None:
    shown, text = parameters(command), " ".join(cap(command, "--help")[0].split())
    found = list(described(config))
    assert found
    for setting, about_it in found:
        parameter = shown[setting.name]
        assert parameter.help.startswith(about_it.help)
        if setting.default is dataclasses.MISSING:
            assert parameter.required
        elif config is not Recipe and isinstance(setting.default, int | float | str | Path):
            assert parameter.default == setting.default
            if not isinstance(setting.default, bool):
                assert f"[default: {setting.default}" in text


def test_every_option_of_every_command_has_help() -> None:
    commands = [*GROUP.commands.values(), *GROUP.commands["bench"].commands.values()]
    for command in commands:
        for parameter in command.params:
            assert parameter.help, (command.name, parameter.name)


def wrong_values(config: type) -> Iterator[tuple[str, str]]:
    for setting, about_it in described(config):
        step = 1 if setting.type.startswith("int") else 0.001
        if about_it.min is not None:
            yield setting.name, str(about_it.min - step)
        if about_it.max is not None:
            yield setting.name, str(about_it.max + step)
        parses = about_it.parse is not None and setting.name != "images"  # may have any name
        if about_it.choices or parses or about_it.presets:
            yield setting.name, "nonsense"


@pytest.mark.parametrize(("command", "config", "told"), COMMANDS)
def test_a_value_outside_the_bounds_is_exit_code_2_and_names_the_option(
    command: str, config: type, told: list[str]
) -> None:
    wrong = list(wrong_values(config))
    assert wrong
    for name, value in wrong:
        _, err = cap(command, *told, f"{flag(name)}={value}", code=2)
        assert f"'{flag(name)}'" in err
        if value == "nonsense":
            assert value in err


@pytest.mark.parametrize(
    ("command", "told", "message"),
    [
        ("train", "--seed=18446744073709551616", "18446744073709551615"),
        ("sweep", "--seed=2147483648", "2147483647"),
        ("train", "--learning-rate=nan", "Invalid value"),
        ("train", "--val-share=nan", "Invalid value"),
        ("train", "--plain --precision=bfloat16", "--plain computes in float32"),
        ("train", "--resume --overwrite", "give one of them"),
        ("train", "--val-cache=v.h5 --val-share=0.1", "--val-share has no effect beside"),
        ("train", "--self-critical-rate=1e-4", "--self-critical-rate has no effect without"),
        ("train", "--self-critical-photos=8", "--self-critical-photos has no effect without"),
        ("predict", "--sample --temperature=nan", "Invalid value"),
        ("predict", "--sample --temperature=inf", "10000"),
        ("predict", "--sample --temperature=1e-40", "0.0001"),
        ("predict", "--temperature=0.7", "--temperature has no effect without --sample"),
        ("evaluate", "--top-p=0.9", "--top-p has no effect without --sample"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line_and_exit_code_2(
    command: str, told: str, message: str
) -> None:
    required = next(arguments for name, _, arguments in COMMANDS if name == command)
    _, err = cap(command, *required, *told.split(), code=2)
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_search_options_need_a_model_to_search_with() -> None:
    told = ["--predictions", "p.json", "--cache", "x.h5", "--beam-size", "5"]
    _, err = cap("evaluate", *told, code=2)
    assert "no effect without --model" in err


def test_a_recipe_made_in_python_is_checked_like_one_of_the_command_line() -> None:
    with pytest.raises(SettingError, match="decay 'linear' is not constant or cosine"):
        Recipe(decay="linear")
    with pytest.raises(SettingError, match=r"dropout 1.0 must be at most 0.95"):
        Recipe(dropout=1.0)
    with pytest.raises(SettingError, match="learning rate nan is not a number"):
        Recipe(learning_rate=float("nan"))
    with pytest.raises(SettingError, match="seed 18446744073709551616 must be at most"):
        TrainConfig(Path("a"), Path("b"), seed=2**64)


def test_a_wrong_word_is_told_the_right_ones() -> None:
    told = ["--images", ".", "--out", "x.h5"]
    _, err = cap("extract-features", *told, "--precision", "int8", code=2)
    assert "'int8' is not auto, float32, bfloat16 or float16" in err
    _, err = cap("extract-features", *told, "--views", "top", code=2)
    assert "unknown view 'top'; there are full, flip, center" in err
    _, err = cap("bench", "train", "--recipe", "worst", code=2)
    assert "'worst' is not best or classic" in err


def test_the_encoders_precisions_can_be_chosen() -> None:
    assert set(PRECISIONS) == {"auto", *DTYPES}


def made(config: type, *arguments: str) -> Any:
    """The settings that a command gets from these arguments."""
    got = []

    def command(settings: Any) -> None:
        got.append(settings)

    command.__annotations__["settings"] = config
    own = typer.Typer()
    own.command()(options(command))
    result = CliRunner().invoke(own, arguments)
    assert result.exit_code == 0, result.output
    return got[0]


@pytest.mark.parametrize(
    ("told", "settings"),
    [
        (["--images", "a", "--out", "b"], ExtractOptions(Path("a"), Path("b"))),
        (["--from-cache", "a", "--out", "b"], TrainConfig(Path("a"), Path("b"))),
        (["--from-cache", "a", "--out", "b"], SweepConfig(Path("a"), Path("b"))),
        ([], SearchConfig()),
        ([], DemoConfig()),
    ],
)
def test_a_command_told_nothing_more_has_the_defaults(told: list[str], settings: Any) -> None:
    assert made(type(settings), *told) == settings


def test_a_recipe_is_changed_by_the_options_that_are_given() -> None:
    told = ["--from-cache", "a", "--out", "b"]
    changes = ["--epochs", "3", "--dropout", "0", "--no-random-views", "--tie-embeddings"]
    for name, recipe in RECIPES.items():
        wanted = dataclasses.replace(
            recipe, epochs=3, dropout=0.0, random_views=False, tie_embeddings=True
        )
        config = made(TrainConfig, *told, "--recipe", name, *changes, "--overwrite")
        assert config == TrainConfig(Path("a"), Path("b"), recipe=wanted, overwrite=True)


def test_text_becomes_the_value_of_its_field() -> None:
    told = ["--images", "a", "--out", "b", "--views", "full,corners", "--shard", "2/8"]
    config = made(ExtractOptions, *told)
    assert config.views == ("full", "top-left", "top-right", "bottom-left", "bottom-right")
    assert config.shard == (2, 8)


@dataclass(frozen=True)
class Boat:
    name: str = field(metadata=about("Name of the boat."))
    masts: int = option(1, "Masts.", min=1, max=3)
    sails: int = 7  # no option


def test_options_stand_where_the_settings_stand() -> None:
    @options
    def launch(*, speed: int = 1, boat: Boat, loud: bool = False) -> None:
        """Launch a boat."""
        print(speed, boat, loud)

    own = typer.Typer()
    own.command()(launch)
    command: Any = typer.main.get_command(own)
    names = [parameter.name for parameter in command.params if "completion" not in parameter.name]
    assert names[:4] == ["speed", "name", "masts", "loud"]
    assert command.help == "Launch a boat."
    result = CliRunner().invoke(own, ["--name", "Ada", "--masts", "2", "--loud"])
    assert result.stdout == "1 Boat(name='Ada', masts=2, sails=7) True\n"
    assert CliRunner().invoke(own, ["--masts", "2"]).exit_code == 2  # a name is required
    assert CliRunner().invoke(own, ["--name", "Ada", "--sails", "9"]).exit_code == 2


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("cap extr", ["extract-features"]),
        ("cap train --from-c", ["--from-cache"]),
        ("cap train --recipe ", ["best", "classic"]),
        ("cap bench train --recipe c", ["classic"]),
        ("cap predict a.jpg --view f", ["full"]),
        ("cap extract-features --backbone vit_b", ["vit_b_16", "vit_b_32"]),
        ("cap bench extract --backbone alex", ["alexnet"]),
    ],
)
def test_the_shell_completes_commands_options_and_words(line: str, completions: list[str]) -> None:
    shell = {
        "_CAP_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(line.split(" ")) - 1),
    }
    code = "import sys; sys.argv = ['cap']; from pipeline.cli.main import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=os.environ | shell,
    )
    assert result.stdout.split() == completions
