"""Every default of extraction. Imports nothing heavy, since `--help` shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pipeline.encoder.networks.known_backbones import BACKBONE_NAMES
from pipeline.encoder.networks.sources import default_weights, recorded_code, recorded_name
from pipeline.photos.sources.patterns import photos_at
from pipeline.photos.views import parse_views
from train.captions.script import TOKENIZER_HELP, TOKENIZERS, TREEBANK
from train.option import SettingError, about, option

# Of the network's arithmetic; `auto` is the fastest that agrees with float32.
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
DECODERS = ("auto", "cpu", "gpu")

IMAGES_HELP = (
    "A folder of photos; or tars (WebDataset's), Parquet files, or addresses such as "
    "s3://bucket/photos. 'photos-{000..999}.tar' and 'photos/*.parquet' name several."
)
CAPTIONS_HELP = (
    "A captions file: a table or JSON of any layout; several if given several times. "
    "`sidecar` for text files beside the photos, `metadata` for captions inside them. "
    "Without it, those that lie with the photos of tars and Parquet files; else none."
)
IMAGE_COLUMN_HELP = (
    "The column or field that names the photos, by name or number from 1, if it is not found."
)
CAPTION_COLUMN_HELP = "The same for the captions."
BACKBONES = BACKBONE_NAMES  # the usual ones
BACKBONE_HELP = (
    "Any torchvision classifier (`cap backbones` lists them), any network of timm (timm:NAME), or "
    "your own (FILE.py:FUNCTION). NAME+stages also takes averages of the stages before the vector."
)


def parse_shard(text: str) -> tuple[int, int]:
    """`2/8` → (2, 8). Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"{text!r} is not I/N with 1 ≤ I ≤ N, as in 2/8")
    return int(match[1]), int(match[2])


_AS_BEGUN = "or as --out was begun, or --reuse made"


@dataclass(frozen=True)
class ExtractOptions:
    """The options of `cap extract-features`. None is a value that the command does not name, and
    that `settled` takes from a cache.
    """

    images: Path | str = field(metadata=about(IMAGES_HELP, parse=photos_at))
    out: Path = field(metadata=about("The cache to write, or to continue."))
    captions: Path | tuple[Path, ...] | None = option(None, CAPTIONS_HELP, many=Path)
    image_column: str | None = option(None, IMAGE_COLUMN_HELP)
    caption_column: str | None = option(None, CAPTION_COLUMN_HELP)
    split: str | None = option(None, "Splits of the captions file, as in train,restval.")
    only: Path | None = option(None, "Extract only the photos named in this file, one per line.")
    tokenizer: str | None = option(
        None, f"{TOKENIZER_HELP}  [default: treebank, {_AS_BEGUN}]", choices=TOKENIZERS
    )
    backbone: str | None = option(
        None, f"{BACKBONE_HELP}  [default: resnet152, {_AS_BEGUN}]", usual=BACKBONES
    )
    weights: str | None = option(
        None,
        "A torchvision name, a .pth or .safetensors file, or random.  [default: IMAGENET1K_V1, "
        f"of timm pretrained, {_AS_BEGUN}]",
    )
    views: tuple[str, ...] | None = option(
        None,
        "Views of each photo, comma-separated: full, flip, center, center-flip, corners.  "
        f"[default: full, {_AS_BEGUN}]",
        parse=parse_views,
    )
    image_size: int | None = option(
        None,
        "Width and height of a view in pixels.  [default: what the network was trained for, 224 "
        f"for most, {_AS_BEGUN}]",
        min=32,
        max=4096,
    )
    batch_size: int | None = option(
        None, "Photos per batch.  [default: 16 on a CPU, 256 on a GPU]", min=1
    )
    workers: int | None = option(
        None, "Readers, which read and decode photos.  [default: one per core]", min=1
    )
    decoder: str = option(
        "auto",
        "What decodes JPEGs: auto (the GPU, where its decoder gives the same pixels), cpu or gpu.",
        choices=DECODERS,
    )
    device: str = option("auto", "auto, cpu, cuda (every GPU), cuda:N, or several: cuda:0,cuda:1.")
    precision: str = option(
        "auto",
        "Precision of the network: auto (fast where it agrees with float32), float32, bfloat16 or "
        "float16.",
        choices=PRECISIONS,
    )
    limit: int | None = option(
        None, "Number of photos to extract, from the first on.  [default: all]", min=1
    )
    # (I, N): the I-th of N shares
    shard: tuple[int, int] | None = option(
        None,
        "I/N, as in 2/8: extract only the I-th of N shares; `cap merge` joins them.",
        parse=parse_shard,
    )
    reuse: Path | None = option(
        None, "An older cache of the same encoder; unchanged photos are copied from it."
    )
    update: bool = option(
        False,
        "Bring --out up to date: other captions, and photos that are new, changed, renamed or "
        "gone. Known photos are not encoded again.",
    )
    overwrite: bool = option(
        False, "Replace --out. An interrupted --overwrite goes on by the same command."
    )
    retry_unreadable: bool = option(False, "Try again to read photos that were set aside.")
    dry_run: bool = option(
        False, "Say what the command would do, in what time and with how much disk; write nothing."
    )

    def __post_init__(self) -> None:
        if self.update and self.overwrite:
            raise SettingError(
                "--update keeps the rows of --out, --overwrite replaces them; give one of them"
            )


@dataclass(frozen=True)
class ExtractConfig(ExtractOptions):
    """The settings of an extraction, all of them known."""

    tokenizer: str = TREEBANK
    backbone: str = "resnet152"
    weights: str = "IMAGENET1K_V1"
    views: tuple[str, ...] = ("full",)
    image_size: int | None = None  # what the network was trained for


_USUAL_SIZE = 224
_RECORDED = ("backbone", "weights", "views", "image_size", "tokenizer")


def settled(options: ExtractOptions) -> tuple[ExtractConfig, str | None]:
    """(the settings, one line if some are those of a cache).

    What the options do not name is taken from the cache at --out that goes on, or else from
    --reuse, or else it is the default. Weights belong to a backbone: they are taken only if the
    backbone is that of the cache. Raises CacheError if the options name another backbone, image
    size or other views than those of the cache at --out, before its weights are downloaded; or if
    the cache's backbone is code, which is not run unless the options name it.
    """
    from cache.record import CacheError

    given = {each.name: getattr(options, each.name) for each in fields(options)}
    source, recorded = _recorded(options)
    if options.backbone is not None:
        given["backbone"] = recorded_name(options.backbone)
    if source is not None and source == options.out:
        for name in ("backbone", "views", "image_size"):
            if given[name] not in (None, recorded.get(name)):
                raise CacheError(
                    f"{source}: made with {name.replace('_', ' ')} {_text(recorded.get(name))}, "
                    f"not {_text(given[name])}. Use another --out, or --overwrite."
                )
    if given["backbone"] not in (None, recorded.get("backbone")):
        recorded = {}
    if source is not None and (code := recorded_code(recorded.get("backbone", ""))) is not None:
        if options.backbone is None:
            raise CacheError(
                f"{source}: its encoder is a program, {code}, which is run only if you name it: "
                f"--backbone {recorded['weights']}:{code.function}"
            )
        del recorded["weights"]  # they come with the program
    given["backbone"] = options.backbone
    taken = {name: value for name, value in recorded.items() if given[name] is None}
    told = {
        name: value for name, value in given.items() if name not in _RECORDED or value is not None
    }
    config = ExtractConfig(**{**told, **taken})
    weights = default_weights(config.backbone)
    if given["weights"] is None and "weights" not in taken:
        config = replace(config, weights=weights)
    usual = {"weights": weights, "image_size": _USUAL_SIZE}
    unusual = [
        f"{name.replace('_', ' ')} {_text(value)}"
        for name, value in taken.items()
        if value != usual.get(name, getattr(ExtractConfig, name))
    ]
    return config, f"as {source} was made: {', '.join(unusual)}" if unusual else None


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _recorded(options: ExtractOptions) -> tuple[Path | None, dict[str, Any]]:
    """(the cache that settings come from, its settings by name)."""
    from cache.seal import attributes_of

    for source in (None if options.overwrite else options.out, options.reuse):
        found = None if source is None else attributes_of(source)
        if found is not None and {"backbone", "weights", "views", "image_size"} <= found.keys():
            recorded: dict[str, Any] = {name: found[name] for name in _RECORDED if name in found}
            return source, {**recorded, "views": tuple(str(found["views"]).split(","))}
    return None, {}
