"""All outputs of one command: opened before the model is loaded, written photo by photo."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.captioner.outputs.coco import CocoResults, ids_of, read_ids
from pipeline.captioner.outputs.forms import Csv, JsonLines
from pipeline.captioner.outputs.growing_file import GrowingFile
from pipeline.captioner.outputs.names_beside import targets_of
from pipeline.captioner.outputs.output import Maker, Output, OutputFileError
from pipeline.captioner.outputs.sidecars import Lines, SidecarForm, Sidecars
from pipeline.captioner.outputs.xmp import Xmp
from pipeline.captioner.predictions import Prediction
from pipeline.captions.writing import COCO, CSV, OutputOptions
from train.config import SearchConfig
from train.model.bundle import find_bundle


class Outputs:
    """A context manager, which closes them."""

    def __init__(
        self,
        options: OutputOptions,
        photos: Sequence[str],
        model: Path,
        search: SearchConfig,
        roots: Iterable[str] = (),
    ) -> None:
        """photos: all paths. roots: those of the user's arguments that are folders.

        Raises BundleError, OutputFileError, IdsError or WriteError.
        """
        self._options = options
        self._outputs: list[Output] = []
        if not options:
            return
        form: dict[str, Any] = {"words": options.words, "log_probs": options.log_probs}
        maker = Maker.of(find_bundle(model), search, form)
        # Whatever --overwrite says, no photo is replaced.
        known = {os.path.realpath(photo) for photo in photos}
        try:
            self._open(photos, maker, search, roots, known)
        except BaseException:
            self.close()
            raise

    def _open(
        self,
        photos: Sequence[str],
        maker: Maker,
        search: SearchConfig,
        roots: Iterable[str],
        known: set[str],
    ) -> None:
        options = self._options
        beside: list[SidecarForm] = [Lines()] * options.sidecar + [Xmp()] * options.xmp
        roots = list(roots)
        for form in beside:
            targets = targets_of(photos, form.suffix, options.sidecar_folder, roots)
            for target in targets.values():
                _check_no_photo(target, known)
            self._outputs.append(
                Sidecars(targets, form, maker, words=options.words, overwrite=options.overwrite)
            )
        if options.out is not None:
            _check_no_photo(options.out, known)
            self._outputs.append(self._file(options.out, photos, maker, search))

    def _file(self, out: Path, photos: Sequence[str], maker: Maker, search: SearchConfig) -> Output:
        options, suffix = self._options, self._options.suffix
        if suffix == COCO:
            listed = None if options.ids is None else read_ids(options.ids)
            ids = ids_of(photos, listed, options.ids)
            return CocoResults(out, ids, maker, words=options.words, overwrite=options.overwrite)
        if suffix == CSV:
            several = search.captions > 1
            return GrowingFile(
                out,
                Csv(maker, words=options.words),
                maker,
                photos,
                several=several,
                overwrite=options.overwrite,
            )
        form = JsonLines(maker, log_probs=options.log_probs)
        return GrowingFile(out, form, maker, photos, overwrite=options.overwrite)

    def wanted(self, photos: Sequence[str]) -> list[str]:
        """The photos that some output has not yet; all of them if nothing is to be written."""
        if not self._outputs:
            return list(photos)
        return [photo for photo in photos if any(each.wants(photo) for each in self._outputs)]

    def write(self, prediction: Prediction) -> None:
        """Raises WriteError."""
        for each in self._outputs:
            if each.wants(prediction.path):
                each.write(prediction)

    def finish(self) -> list[str]:
        """Complete all of them. Returns lines for the user. Raises WriteError."""
        return [line for each in self._outputs for line in each.finish()]

    def kept(self) -> str:
        """What is there if the command ends now, and how to go on; empty if that is nothing."""
        kept = [text for each in self._outputs if (text := each.kept())]
        if not kept:
            return ""
        without = " without --overwrite" if self._options.overwrite else ""
        return f"{'; '.join(kept)}; the same command{without} goes on"

    def close(self) -> None:
        for each in self._outputs:
            each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_no_photo(path: Path, photos: set[str]) -> None:
    if os.path.realpath(path) in photos:
        raise OutputFileError(f"{path}: is one of the photos, which are never changed")
