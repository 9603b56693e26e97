"""The settings of a comparison of encoders. Imports nothing heavy, since `--help` shows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pipeline.extraction.config import (
    CAPTION_COLUMN_HELP,
    CAPTIONS_HELP,
    IMAGE_COLUMN_HELP,
    IMAGES_HELP,
)
from pipeline.photos.sources.patterns import photos_at
from pipeline.photos.views import parse_views
from train.captions.script import TOKENIZER_HELP, TOKENIZERS
from train.config import DEVICE_HELP
from train.option import SettingError, about, check_bounds, option


def parse_names(text: str) -> tuple[str, ...]:
    """`resnet50,mobilenet_v2` → the names. Raises ValueError."""
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise ValueError(f"{text!r}: names of backbones, with commas between them, each once")
    return names


@dataclass(frozen=True)
class ComparisonConfig:
    """The settings of `cap compare-encoders`."""

    images: Path | str = field(metadata=about(IMAGES_HELP, parse=photos_at))
    captions: tuple[Path, ...] = option((), CAPTIONS_HELP, many=Path)
    out: Path = option(Path("encoders"), "Folder for the caches, the models and the table.")
    backbones: tuple[str, ...] = option(
        ("mobilenet_v2", "resnet50", "resnet152"),
        "Backbones to compare, comma-separated; `cap backbones` lists them.",
        parse=parse_names,
    )
    weights: tuple[str, ...] = option(
        (),
        "BACKBONE=WEIGHTS, as in resnet50=mine.pth or resnet50=random; once for each backbone "
        "whose published weights are not meant.",
        many=str,
    )
    image_size: int | None = option(
        None, "Width and height of a view in pixels.  [default: each backbone's own]", min=32
    )
    views: tuple[str, ...] = option(
        ("full",), "Views of each photo, comma-separated, as for extraction.", parse=parse_views
    )
    image_column: str | None = option(None, IMAGE_COLUMN_HELP)
    caption_column: str | None = option(None, CAPTION_COLUMN_HELP)
    split: str | None = option(None, "Splits of the captions file, as in train,restval.")
    tokenizer: str | None = option(
        None, f"{TOKENIZER_HELP}  [default: treebank]", choices=TOKENIZERS
    )
    limit: int | None = option(
        None, "Number of photos to use, from the first on.  [default: all]", min=2
    )
    steps: int = option(1000, "Training steps on each encoder's features, in whole epochs.", min=1)
    seed: int = option(0, "Seed of everything random.", min=0)
    device: str = option("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        """Raises SettingError."""
        check_bounds(self)
        for text in self.weights:
            name, equals, weights = text.partition("=")
            if not equals or not weights:
                raise SettingError(f"--weights {text!r} is not BACKBONE=WEIGHTS")
            if name not in self.backbones:
                raise SettingError(f"--weights {text!r}: {name} is not among --backbones")

    def weights_of(self, backbone: str) -> str | None:
        """The weights that the user names for a backbone; None for the published ones."""
        named = dict(text.split("=", 1) for text in self.weights)
        return named.get(backbone)
