"""The command line: the commands by name. They parse, call, print, and turn errors into messages.

Heavy imports happen inside the commands, so that help appears at once.
"""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.arguments.command import Command, Group
from pipeline.cli.arguments.verbosity import with_verbosity
from pipeline.cli.bench import bench
from pipeline.cli.cache import info, merge, verify
from pipeline.cli.extract import backbones, extract_features
from pipeline.cli.models.caption import demo, evaluate
from pipeline.cli.models.classic import import_classic
from pipeline.cli.models.compare import compare_encoders
from pipeline.cli.models.explain import explain
from pipeline.cli.models.export import export
from pipeline.cli.models.predict import predict
from pipeline.cli.models.search import search
from pipeline.cli.models.serve import serve
from pipeline.cli.training.commands import build_vocab, runs, sweep, train


def show_version(wanted: bool) -> None:
    """Print the versions that a report of a bug needs, and end the command."""
    if wanted:
        import platform
        from importlib.metadata import PackageNotFoundError, version

        try:
            ours = version("cap")
        except PackageNotFoundError:  # run from a copy of the source
            ours = "(not installed)"
        print(f"cap {ours} (Python {platform.python_version()}, torch {version('torch')})")
        raise typer.Exit


app = typer.Typer(
    cls=Group,
    help="Turn photos and captions into a captioning model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def cap(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=show_version),
    ] = False,
) -> None:
    """Turn photos and captions into a captioning model."""


app.command("extract-features")(extract_features)
app.command()(backbones)
app.command()(merge)
app.command()(info)
app.command()(verify)
app.command("build-vocab")(build_vocab)
app.command()(train)
app.command()(sweep)
app.command()(runs)
app.command("import-classic")(import_classic)
app.command()(evaluate)
app.command()(predict)
app.command()(search)
app.command()(serve)
app.command()(explain)
app.command()(export)
app.command("compare-encoders")(compare_encoders)
app.command()(demo)
app.add_typer(bench, name="bench", cls=Group)

for group in (app, bench):
    for registered in group.registered_commands:
        registered.cls = Command
        assert registered.callback is not None
        registered.callback = with_verbosity(registered.callback)
