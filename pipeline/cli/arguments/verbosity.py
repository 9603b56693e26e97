"""`--quiet` and `--verbose`, which every command has."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from cache.share import share
from pipeline.cli.errors import WrongArguments
from pipeline.cli.terminal import Verbosity, mention, set_verbosity

_QUIET = Annotated[
    bool, typer.Option("--quiet", "-q", help="Write results and errors only: no progress.")
]
_VERBOSE = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also write what asks for nothing.")
]


def with_verbosity(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command both options, after its own."""
    signature = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("quiet", _QUIET), ("verbose", _VERBOSE))
    ]
    parameters = [*signature.parameters.values(), *added]

    @functools.wraps(command)
    def with_options(*, quiet: bool, verbose: bool, **given: Any) -> None:
        if quiet and verbose:
            raise WrongArguments("--quiet and --verbose contradict each other; give one of them")
        levels = {(True, False): Verbosity.QUIET, (False, True): Verbosity.VERBOSE}
        set_verbosity(levels.get((quiet, verbose), Verbosity.USUAL))
        if verbose:
            mention(f"may use {share()}")
        try:
            command(**given)
        finally:
            set_verbosity(Verbosity.USUAL)

    # Where typer looks: at the signature, and at the annotations.
    with_options.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    )
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options
