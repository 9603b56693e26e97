"""The class of all commands: what is typed is checked as a whole before the command begins."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from pipeline.cli.arguments.files import wrong_file
from pipeline.cli.terminal import one_line, say


class Command(TyperCommand):
    """A command that recognises files of the wrong kind."""

    def invoke(self, ctx: Any) -> Any:
        flags = {
            parameter.name: parameter.opts[0] if parameter.opts[0][:1] == "-" else "the argument"
            for parameter in self.params
            if parameter.name
        }
        problem = wrong_file(self.name or "", flags, ctx.params)
        if problem is not None:
            say(f"error: {one_line(problem)}")
            raise typer.Exit(1)
        return super().invoke(ctx)
