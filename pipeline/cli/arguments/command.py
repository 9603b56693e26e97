"""The class of all commands: what is typed is checked as a whole before the command begins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.cli.arguments.files import wrong_file
from pipeline.cli.arguments.names import near_options
from pipeline.cli.errors import WrongArguments
from pipeline.cli.terminal import complain, one_line
from pipeline.cli.training.together import company_of
from train.option import or_list


class Command(TyperCommand):
    """A command that recognises files of the wrong kind, and misspelt options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # as for completion
            _refuse_empty(args, ctx)
        with _near_options(self, ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        flags = {
            parameter.name: parameter.opts[0] if parameter.opts[0][:1] == "-" else "the argument"
            for parameter in self.params
            if parameter.name
        }
        name = self.name or ""
        in_group = ctx.parent is not None and ctx.parent.parent is not None
        full_name = f"{ctx.parent.command.name} {name}" if in_group else name
        problem = company_of(full_name) or wrong_file(name, flags, ctx.params)
        if problem is not None:
            complain(f"error: {one_line(problem)}")
            raise typer.Exit(1)
        return super().invoke(ctx)


class Group(TyperGroup):
    """The commands together, with options of their own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _near_options(self, ctx):
            return super().parse_args(ctx, args)


def _refuse_empty(args: list[str], ctx: Any) -> None:
    """Raise WrongArguments for an empty value, which would mean the present folder."""
    for before, arg in pairwise(["", *args]):
        name, is_given, value = arg.partition("=")
        if not arg or (arg[:2] == "--" and is_given and not value):
            name = name or (before if before[:2] == "--" else "an argument")
            text = f"the value of {name} is empty; is a variable of the shell not set?"
            raise WrongArguments(text, ctx=ctx)


@contextlib.contextmanager
def _near_options(command: TyperCommand | TyperGroup, ctx: Any) -> Iterator[None]:
    """Say which options an unknown one may stand for. Raises WrongArguments."""
    try:
        yield
    except Exception as error:
        # typer's own class for an unknown option is private, and has these two attributes.
        if not hasattr(error, "option_name") or not hasattr(error, "possibilities"):
            raise
        known = [name for parameter in command.get_params(ctx) for name in parameter.opts]
        near = near_options(error.option_name, known)
        advice = f". Did you mean {or_list(near)}?" if near else ""
        text = f"No such option: {one_line(error.option_name)}{advice}"
        raise WrongArguments(text, ctx=ctx) from None
