"""`cap bench`: the measurements behind every speed we quote, on the user's own machine."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.errors import errors
from pipeline.cli.options import Backbone, Device, Json, choice
from pipeline.cli.terminal import ProgressLine, print_json, say
from train.config import PRECISIONS, RECIPES

bench = typer.Typer(
    help="Measure the speed of this machine with generated data.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench.command("cache")
def bench_cache(
    photos: Annotated[int, typer.Option(min=1, help="Photos in the cache.")] = 82_783,
    as_json: Json = False,
) -> None:
    """Measure writing and reading a cache.

    At COCO's size it takes 0.7 GB of disk and of memory.

    Example: cap bench cache
    """
    with errors():
        import torch

        from pipeline.bench.cache import bench_cache as run
        from pipeline.bench.machine import describe_machine

        machine = describe_machine(torch.device("cpu"))
        say(machine.summary())
        result = run(photos)
        if as_json:
            ratios = {"batch_ratio": result.batch_ratio, "load_share": result.load_share}
            print_json({**dataclasses.asdict(result), **ratios, "machine": machine.summary()})
        else:
            print(result.table())


@bench.command("train")
def bench_train(
    recipe: Annotated[str, choice("Recipe of our step: classic or best.", RECIPES)] = "classic",
    batch_size: Annotated[int, typer.Option(min=2, help="Captions per step.")] = 128,
    hidden_size: Annotated[
        int | None, typer.Option(min=1, help="LSTM hidden size.  [default: the recipe's]")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(min=1, help="LSTM layers.  [default: the recipe's]")
    ] = None,
    photos: Annotated[
        int, typer.Option(min=500, help="Photos in the cache, with five captions each.")
    ] = 82_783,
    precision: Annotated[
        str,
        choice("Precision of our step's matrix products: auto, float32 or bfloat16.", PRECISIONS),
    ] = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time a training step, the classic way and ours.

    The vocabulary and the captions are of COCO's size. Takes 1 GB of disk.

    Example: cap bench train
    """
    chosen = RECIPES[recipe]
    chosen = dataclasses.replace(
        chosen,
        batch_size=batch_size,
        hidden_size=hidden_size or chosen.hidden_size,
        num_layers=num_layers or chosen.num_layers,
    )
    with errors():
        from pipeline.bench.machine import describe_machine
        from pipeline.bench.training.train import bench_train as run
        from train.device import resolve_device

        machine = describe_machine(resolve_device(device))
        say(machine.summary())
        result = run(chosen, device=device, precision=precision, photos=photos)
        if as_json:
            derived = {
                "ratio": result.ratio,
                "limit_share": result.limit_share,
                "epoch_s": result.epoch_s,
                "limit_epoch_s": result.limit_epoch_s,
                "captions_per_s": result.captions_per_s,
            }
            print_json({**dataclasses.asdict(result), **derived, "machine": machine.summary()})
        else:
            print(result.table())


@bench.command("predict")
def bench_predict(
    backbone: Backbone = "resnet152",
    weights: Annotated[str, typer.Option(help="As for `cap extract-features`.")] = "random",
    photos: Annotated[int, typer.Option(min=8, help="Photos to caption.")] = 64,
    cold_runs: Annotated[
        int, typer.Option(min=1, help="Cold starts per beam size, each in a fresh process.")
    ] = 5,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure captioning.

    Times one photo from the prompt, one with a loaded model, and a folder.

    Example: cap bench predict
    """
    with errors():
        from pipeline.bench.captioning.predict import bench_predict as run

        with ProgressLine("captioning", "steps") as line:
            result = run(
                backbone=backbone,
                weights=weights,
                photos=photos,
                cold_runs=cold_runs,
                device=device,
                progress=line.update,
            )
        say(result.machine.summary())
        if as_json:
            print_json({**dataclasses.asdict(result), "machine": result.machine.summary()})
        else:
            print(result.table())


@bench.command("serve")
def bench_serve(
    backbone: Backbone = "resnet152",
    weights: Annotated[str, typer.Option(help="As for `cap extract-features`.")] = "random",
    photos: Annotated[
        int, typer.Option(min=8, help="Photos that are sent one by one, and then by turns.")
    ] = 32,
    requests: Annotated[int, typer.Option(min=1, help="Requests under load.")] = 200,
    clients: Annotated[int, typer.Option(min=1, help="Requests at a time under load.")] = 8,
    beam_size: Annotated[int, typer.Option(min=1, help="Beams of the search.")] = 3,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure the server.

    Starts `cap serve` in a process of its own. One photo at a time takes turns with a model in this
    process. Then many requests come at once.

    Example: cap bench serve
    """
    with errors():
        from pipeline.bench.captioning.serve import bench_serve as run

        with ProgressLine("serving", "requests") as line:
            result = run(
                backbone=backbone,
                weights=weights,
                photos=photos,
                requests=requests,
                clients=clients,
                beam_size=beam_size,
                device=device,
                progress=line.update,
            )
        say(result.machine.summary())
        if as_json:
            print_json({**dataclasses.asdict(result), "machine": result.machine.summary()})
        else:
            print(result.table())


@bench.command("beside")
def bench_beside(
    processes: Annotated[
        int, typer.Option(min=1, help="Busy processes beside which commands are measured.")
    ] = 2,
    rounds: Annotated[
        int, typer.Option(min=1, help="Run each command this often; the median counts.")
    ] = 3,
    backbone: Backbone = "resnet50",
    photos: Annotated[int, typer.Option(min=8, help="Photos to extract and caption.")] = 48,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="How long captioners are measured.")
    ] = 10.0,
    as_json: Json = False,
) -> None:
    """Measure what commands lose beside other work on the same cores.

    Runs extraction, training, a sweep (if Optuna is installed) and prediction alone and beside busy
    processes, in turns. Then measures one, two, four and eight processes that caption one photo a
    call. All on the CPU, with random weights; takes some minutes.

    Example: cap bench beside --processes 2
    """
    with errors():
        from pipeline.bench.beside import bench_beside as run

        with ProgressLine("measuring", "steps") as line:
            result = run(
                processes=processes,
                rounds=rounds,
                backbone=backbone,
                photos=photos,
                seconds=seconds,
                progress=line.update,
            )
        if as_json:
            print_json(dataclasses.asdict(result))
        else:
            print(result.table())


@bench.command("extract")
def bench_extract(
    backbone: Backbone = "resnet152",
    photos: Annotated[
        int | None,
        typer.Option(
            min=1, help="Photos to extract end to end.  [default: 192 on a CPU, 8192 on a GPU]"
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Width x height of all photos, as in 640x480.  [default: COCO's mix]"),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Measure on your photos: some of this folder, read where they are."),
    ] = None,
    device: Device = "auto",
    rounds: Annotated[
        int, typer.Option(min=1, help="Measure each part this often; the best counts.")
    ] = 3,
    as_json: Json = False,
) -> None:
    """Measure each part of an extraction, and the whole.

    Works with random weights, since speed does not depend on them. The photos are generated, in
    files like COCO's: its sizes, bytes, metadata and colour profiles, with a few progressive, 4:2:0
    and turned ones. Each takes 0.16 MB of disk in the folder for temporary files (TMPDIR), so 192
    take 32 MB and 8,192 take 1.4 GB. The files are in memory when they are read; the disk is not
    measured. Takes one or two minutes.

    Example: cap bench extract --backbone resnet50
    """
    match = None if size is None else re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", size)
    if size is not None and match is None:
        raise typer.BadParameter(f"{size!r} is not like 640x480", param_hint="--size")
    if size is not None and images is not None:
        raise typer.BadParameter("photos of --images have sizes of their own", param_hint="--size")
    with errors():
        from pipeline.bench.extract import bench_extract as run
        from pipeline.bench.machine import describe_machine
        from train.device import resolve_device

        machine = describe_machine(resolve_device(device))
        say(machine.summary())
        result = run(
            backbone,
            photos,
            size=None if match is None else (int(match[1]), int(match[2])),
            images=images,
            device=device,
            rounds=rounds,
            say=say,
        )
        if as_json:
            print_json(result.as_dict() | {"machine": machine.summary()})
        else:
            print(result.table())
