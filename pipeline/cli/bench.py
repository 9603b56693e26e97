"""`cap bench`: the measurements behind every figure of speed, on the user's own machine."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

import typer

from pipeline.cli.errors import Device, Json, errors, one_of, print_json
from pipeline.cli.terminal import say
from train.config import RECIPES

bench = typer.Typer(
    help="Measure the speed of this machine, with data made on the spot.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@bench.command("cache")
def bench_cache(
    photos: Annotated[int, typer.Option(min=1, help="Rows of the cache.")] = 82_783,
    as_json: Json = False,
) -> None:
    """Measure writing and reading a cache; at COCO's size it takes 0.7 GB of disk and of memory.

    Example: cap bench cache
    """
    with errors():
        import torch

        from pipeline.bench.cache import bench_cache as run
        from train.machine import describe_machine

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
    recipe: Annotated[str, typer.Option(help="Of the fast step: classic or best.")] = "classic",
    batch_size: Annotated[int, typer.Option(min=2, help="Captions a step.")] = 128,
    hidden_size: Annotated[
        int | None, typer.Option(min=1, help="Of the LSTM.  [default: of the recipe]")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(min=1, help="Of the LSTM.  [default: of the recipe]")
    ] = None,
    photos: Annotated[
        int, typer.Option(min=500, help="Photos of the cache; five captions each.")
    ] = 82_783,
    precision: Annotated[
        str, typer.Option(help="Of the fast step's products: auto, float32 or bfloat16.")
    ] = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time a training step at COCO's size, the classic way and ours; takes 1 GB of disk.

    Example: cap bench train
    """
    one_of("--recipe", recipe, tuple(RECIPES))
    one_of("--precision", precision, ("auto", "float32", "bfloat16"))
    chosen = RECIPES[recipe]
    chosen = dataclasses.replace(
        chosen,
        batch_size=batch_size,
        hidden_size=hidden_size or chosen.hidden_size,
        num_layers=num_layers or chosen.num_layers,
    )
    with errors():
        from pipeline.bench.train import bench_train as run
        from train.device import resolve_device
        from train.machine import describe_machine

        machine = describe_machine(resolve_device(device))
        say(machine.summary())
        result = run(chosen, device=device, precision=precision, photos=photos)
        if as_json:
            derived = {
                "ratio": result.ratio,
                "epoch_s": result.epoch_s,
                "limit_epoch_s": result.limit_epoch_s,
                "captions_per_s": result.captions_per_s,
            }
            print_json({**dataclasses.asdict(result), **derived, "machine": machine.summary()})
        else:
            print(result.table())


@bench.command("predict")
def bench_predict(
    backbone: Annotated[str, typer.Option(help="Any torchvision classifier.")] = "resnet152",
    weights: Annotated[str, typer.Option(help="As for extract-features.")] = "random",
    photos: Annotated[int, typer.Option(min=8, help="Photos to caption.")] = 64,
    cold_runs: Annotated[int, typer.Option(min=1, help="Fresh processes a beam size.")] = 5,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure captioning: a photo from the prompt, a photo with a loaded model, and a folder.

    Example: cap bench predict
    """
    with errors():
        from pipeline.bench.predict import bench_predict as run

        result = run(
            backbone=backbone, weights=weights, photos=photos, cold_runs=cold_runs, device=device
        )
        say(result.machine.summary())
        if as_json:
            print_json({**dataclasses.asdict(result), "machine": result.machine.summary()})
        else:
            print(result.table())


@bench.command("extract")
def bench_extract(
    backbone: Annotated[str, typer.Option(help="Any torchvision classifier.")] = "resnet152",
    photos: Annotated[
        int | None,
        typer.Option(min=1, help="For end to end.  [default: 192 on a CPU, 16384 on a GPU]"),
    ] = None,
    size: Annotated[str, typer.Option(help="Width x height of a photo, in pixels.")] = "640x480",
    device: Device = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Each part is as good as its best.")] = 3,
    as_json: Json = False,
) -> None:
    """Measure each part of an extraction alone, and the whole, on JPEGs made on the spot.

    Takes one or two minutes. The weights are random: speed does not depend on them.

    Example: cap bench extract --backbone resnet50
    """
    match = re.fullmatch(r"([1-9]\d{1,3})x([1-9]\d{1,3})", size)
    if match is None:
        raise typer.BadParameter(f"{size!r} is not like 640x480", param_hint="--size")
    with errors():
        from pipeline.bench.extract import bench_extract as run
        from train.device import resolve_device
        from train.machine import describe_machine

        machine = describe_machine(resolve_device(device))
        say(machine.summary())
        result = run(
            backbone,
            photos,
            size=(int(match[1]), int(match[2])),
            device=device,
            rounds=rounds,
        )
        if as_json:
            print_json(result.as_dict() | {"machine": machine.summary()})
        else:
            print(result.table())
