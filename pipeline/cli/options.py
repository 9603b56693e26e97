"""The options of the commands: made from the settings' dataclasses, or shared by several commands.

    @options
    def sweep(*, config: SweepConfig, as_json: Json = False) -> None:

gives the command an option for each described field of SweepConfig (see `train/option.py`): type,
default, help, bounds and choices are the field's. typer sees only the options, in the place of
`config` and in the order of the fields; the function gets the SweepConfig made of them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from pipeline.cli.errors import WrongArguments
from pipeline.encoder.networks.known_backbones import BACKBONE_NAMES
from pipeline.encoder.networks.sources import code_file
from pipeline.extraction.config import BACKBONE_HELP, CAPTION_COLUMN_HELP, IMAGE_COLUMN_HELP
from train.config import DEVICE_HELP
from train.option import Option, SettingError, described, or_list

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Device = Annotated[str, typer.Option(help=DEVICE_HELP)]
Backbone = Annotated[
    str, typer.Option(help=BACKBONE_HELP, autocompletion=lambda: list(BACKBONE_NAMES))
]
ImageColumn = Annotated[str | None, typer.Option(help=IMAGE_COLUMN_HELP)]
CaptionColumn = Annotated[str | None, typer.Option(help=CAPTION_COLUMN_HELP)]
OwnBackbone = Annotated[
    str | None,
    typer.Option(help="FILE.py:FUNCTION, if that is the encoder: it is run only if you name it."),
]
MovedWeights = Annotated[
    str | None, typer.Option(help="Where the backbone's weights are now, if they were moved.")
]
Gallery = Annotated[
    Path | None, typer.Option(help="Folder for a page with the photos and their captions.")
]
Sheet = Annotated[
    Path | None, typer.Option(help="PNG for the photos with their captions below them.")
]


def own_or_moved(backbone: str | None, weights: str | None) -> str | None:
    """Where the encoder's numbers are, as two options say it. Raises WrongArguments."""
    if backbone is not None and weights is not None:
        raise WrongArguments(f"{backbone} brings its weights with it; leave out --weights")
    if backbone is not None and code_file(backbone) is None:
        raise WrongArguments(
            f"--backbone is for a program, FILE.py:FUNCTION, and not {backbone!r}; the model "
            "records any other backbone"
        )
    return backbone or weights


def choice(help: str, words: Iterable[str]) -> Any:
    """For `Annotated`: an option that is one of these words."""
    return _typer_option(Option(help, choices=tuple(words)), ...)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of its settings: of each parameter that is a dataclass."""
    signature = inspect.signature(command, eval_str=True)
    configs: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            configs[parameter.name] = kind
            parameters.extend(_parameters(kind))
        else:
            parameters.append(parameter)

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        made = {name: _from_options(config, given) for name, config in configs.items()}
        command(**made, **given)

    # Where typer looks: at the signature, and at the annotations.
    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


def _parameters(config: type) -> Iterator[inspect.Parameter]:
    """One parameter per option, in the order of the fields."""
    types = get_type_hints(config)
    for field, option in described(config):
        if option.presets is None:
            default = ... if field.default is dataclasses.MISSING else field.default
            yield _parameter(field.name, types[field.name], default, option)
        else:
            name = next(n for n, preset in option.presets.items() if preset == field.default)
            named = Option(option.help, choices=tuple(option.presets))
            yield _parameter(field.name, str, name, named)
            yield from _changes(types[field.name], option.presets)


def _changes(config: type, presets: Mapping[str, Any]) -> Iterator[inspect.Parameter]:
    """One parameter per field that can be changed in a preset. Its help shows the presets' values;
    its default is None, for no change.
    """
    types = get_type_hints(config)
    for field, option in described(config):
        values = {name: getattr(preset, field.name) for name, preset in presets.items()}
        shown = ", ".join(f"{name}: {_in_words(value)}" for name, value in values.items())
        option = dataclasses.replace(option, help=f"{option.help}  [{shown}]")
        yield _parameter(field.name, types[field.name] | None, None, option)


def _in_words(value: object) -> str:
    if value is None:
        return "by the data"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _parameter(name: str, kind: Any, default: Any, option: Option) -> inspect.Parameter:
    # Left to itself, typer would also make a --no-… of each flag.
    flags = [f"--{name.replace('_', '-')}"] if kind is bool else []
    if option.parse is not None:
        kind = str if default is not None else str | None
        default = ",".join(default) if isinstance(default, tuple) else default
    if option.many is not None:
        kind, default = list[option.many] | None, None  # type: ignore[name-defined]
    info = _typer_option(option, default, *flags)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=info, annotation=kind)


def _typer_option(option: Option, default: Any, *flags: str) -> Any:
    words = option.choices or option.usual
    return typer.Option(
        default,
        *flags,
        help=option.help,
        min=option.min,
        max=option.max,
        # Left to itself, typer would show the type of the whole list.
        metavar=f"<{option.many.__name__.lower()}>" if option.many is not None else None,
        callback=_reader(option),
        autocompletion=(lambda: list(words)) if words else None,
    )


def _from_options(config: type, given: dict[str, Any]) -> Any:
    """The settings, made of the values of their options, which are taken out of `given`.

    Raises WrongArguments if the settings refuse a value.
    """
    values = {}
    try:
        for field, option in described(config):
            value = given.pop(field.name)
            if option.presets is not None:
                preset = option.presets[value]
                names = [inner.name for inner, _ in described(type(preset))]
                changes = {name: given.pop(name) for name in names}
                told = {name: change for name, change in changes.items() if change is not None}
                value = dataclasses.replace(preset, **told)
            values[field.name] = tuple(value) if option.many and value else value
        return config(**values)
    except SettingError as error:
        raise WrongArguments(str(error)) from None


def _reader(option: Option) -> Callable[[str | None], Any] | None:
    """What typer is to call with the text of an option; None where the text is the value."""
    parse = (lambda word: _one_of(option.choices, word)) if option.choices else option.parse
    if parse is None:
        return None

    def read(text: str | None) -> Any:
        try:
            return None if text is None else parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return read


def _one_of(words: tuple[str, ...], word: str) -> str:
    if word not in words:
        raise ValueError(f"{word!r} is not {or_list(words)}")
    return word
