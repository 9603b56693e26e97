"""Which files captions are written to. Imports nothing heavy, since `--help` shows it.

`pipeline/captioner/outputs` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from train.option import SettingError, option

CSV, JSONL, COCO = SUFFIXES = (".csv", ".jsonl", ".coco.json")


@dataclass(frozen=True)
class OutputOptions:
    """What is to be written where."""

    out: Path | None = option(
        None,
        "File for the captions, instead of standard output: .csv, .jsonl or .coco.json (COCO's "
        "results). What is in it already is not computed again.",
    )
    ids: Path | None = option(
        None, "File with the photos' ids for .coco.json, such as image_info_test2014.json."
    )
    sidecar: bool = option(False, "Write p1.txt beside p1.jpg, unless it is somebody else's.")
    xmp: bool = option(False, "Write p1.xmp beside p1.jpg, with the caption as the description.")
    sidecar_folder: Path | None = option(
        None, "Folder for the files of --sidecar and --xmp, instead of beside the photos."
    )
    overwrite: bool = option(False, "Begin anew, and replace files that hold something else.")
    words: bool = False  # the model's words, not sentences
    log_probs: bool = False  # in JSON

    def __post_init__(self) -> None:
        """Raises SettingError for what contradicts itself or has no effect."""
        if self.out is not None and self.suffix is None:
            raise SettingError(
                f"--out {self.out} ends in none of {', '.join(SUFFIXES)}, which say what to write"
            )
        if self.ids is not None and self.suffix != COCO:
            raise SettingError(f"--ids has no effect without --out FILE{COCO}")
        if self.sidecar_folder is not None and not (self.sidecar or self.xmp):
            raise SettingError("--sidecar-folder has no effect without --sidecar or --xmp")

    @property
    def suffix(self) -> str | None:
        """The one of SUFFIXES that `out` has; None if it has another."""
        name = "" if self.out is None else self.out.name.lower()
        fitting = (suffix for suffix in SUFFIXES if name.endswith(suffix) and name != suffix)
        return next(fitting, None)

    def __bool__(self) -> bool:
        """Whether anything is to be written."""
        return self.out is not None or self.sidecar or self.xmp
