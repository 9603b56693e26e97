"""The backbone that a cache or a model was made with, wherever its weights are now.

A record names the weights' file and the SHA-256 of their numbers, which is not that of the file. If
the file is not where the record says, the weights are looked for where a moved file usually is.
Only weights with the recorded SHA-256 count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from cache.record import EncoderRecord
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.errors import EncoderError, MissingPackageError
from pipeline.encoder.networks.sources import RecordedCode, code_file, recorded_code
from pipeline.encoder.weights import load_backbone

_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin")
_FOLDERS_UP = 3  # from `project/runs/base/best.cap` to `project`
_FILES_TRIED = 16  # each is read whole


def recorded_backbone(
    record: EncoderRecord, weights: str | None = None, near: Path | None = None
) -> Backbone:
    """The backbone of a record.

    weights: where its weights are; by default, where the record says, beside `near` and in the
    folders above it, in the current folder, and in torch's cache. A file in one of these folders
    may also have another name. near: the model or cache with the record. Raises EncoderError if
    the weights are not found, or if `weights` are others.

    A backbone that is code is run only if `weights` names its file, with or without `:FUNCTION`.
    """
    if (code := recorded_code(record.backbone)) is not None:
        return _of_code(record, code, weights)
    try:
        return _checked(record, weights or record.weights)
    except MissingPackageError:
        raise
    except EncoderError as error:
        if weights is None:
            for path in islice(_candidates(record, near), _FILES_TRIED):
                try:
                    return _checked(record, str(path))
                except EncoderError:
                    continue
        raise EncoderError(
            f"{error}; name the file with --weights: of {record.backbone}, with numbers whose "
            f"SHA-256 begins {record.weights_sha256[:12]}"
        ) from None


def _checked(record: EncoderRecord, weights: str) -> Backbone:
    backbone = load_backbone(record.backbone, weights, record.image_size)
    if backbone.weights_sha256 != record.weights_sha256:
        raise EncoderError(
            f"{weights}: weights {backbone.weights_sha256[:12]}…, the model was trained on "
            f"features of weights {record.weights_sha256[:12]}…"
        )
    return backbone


def _of_code(record: EncoderRecord, recorded: RecordedCode, named: str | None) -> Backbone:
    whole = f"{record.weights}:{recorded.function}"
    if named is None:
        raise EncoderError(
            f"the encoder is a program, {recorded}, which is run only if you name it: "
            f"--backbone {whole}"
        )
    code = code_file(named) or code_file(f"{named}:{recorded.function}")
    if code is None or code.function != recorded.function:
        raise EncoderError(f"{named}: is not the function {recorded}, once --backbone {whole}")
    found = recorded_code(code.recorded(code.read()))
    if found is None or found.sha256 != recorded.sha256:  # before it is run
        raise EncoderError(f"{code.path}: is not the file of {recorded}, or was changed since")
    backbone = load_backbone(f"{code.path}:{code.function}", "", record.image_size)
    if backbone.weights_sha256 != record.weights_sha256:
        raise EncoderError(
            f"{code.path}: makes weights {backbone.weights_sha256[:12]}…, the model was trained on "
            f"features of weights {record.weights_sha256[:12]}…"
        )
    return replace(backbone, name=record.backbone)


def _candidates(record: EncoderRecord, near: Path | None) -> Iterator[Path]:
    """Files that may hold the weights: first those with the recorded name, then others."""
    recorded = Path(record.weights)
    beside = list(near.absolute().parents[:_FOLDERS_UP]) if near is not None else []
    here = Path.cwd()
    cached = Path(torch.hub.get_dir()) / "checkpoints"
    named = [folder / recorded for folder in beside]  # of a relative path, as 0.1.0 recorded it
    named += [folder / recorded.name for folder in (*beside, here, cached)]
    seen = set[Path]()
    for path in named:
        if path not in seen and os.path.isfile(path):
            seen.add(path)
            yield path
    for folder in dict.fromkeys((recorded.absolute().parent, *beside, here)):
        try:
            paths = sorted(folder.iterdir())
        except OSError:  # gone, or closed to this user
            continue
        for path in paths:
            if path.suffix in _SUFFIXES and path not in seen and os.path.isfile(path):
                seen.add(path)
                yield path
