"""A network that a function of the user's own Python file makes. The contract is in
`docs/encoders.md`. This module runs the file: only call it where the user has named the file.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.headless import Headless
from pipeline.encoder.networks.sources import CodeFile
from pipeline.photos.preprocessing import IMAGENET, Preprocessing
from train.torch_import import import_meta_kernels

_SEED = 0
_KEYS = ("image_size", "filter", "mean", "std")


def own_network(code: CodeFile, content: bytes) -> Headless:
    """The network that `code` makes, on the CPU in float32. content: its file's bytes, as read.

    Raises EncoderError, with the line of the file, if running it fails or gives something else than
    a network, its number of features and its preprocessing.
    """
    module = ModuleType(code.path.stem)
    module.__file__ = str(code.path)
    where = f"{code.path}:{code.function}"
    import_meta_kernels()  # the file may import anything
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)  # so that weights that the function draws are the same each time
        try:
            exec(compile(content, str(code.path), "exec"), vars(module))
        except (Exception, SystemExit) as error:
            raise EncoderError(f"{code.path}: cannot be run ({_reason(code, error)})") from None
        make = vars(module).get(code.function)
        if not callable(make):
            raise EncoderError(f"{code.path}: has no function {code.function!r}")
        try:
            made = make()
        except (Exception, SystemExit) as error:
            raise EncoderError(f"{where} fails ({_reason(code, error)})") from None
    if not isinstance(made, tuple) or len(made) != 3:
        raise EncoderError(
            f"{where}: returns {_kind(made)}; must return network, feature_dim, preprocessing"
        )
    network, feature_dim, wanted = made
    if not isinstance(network, nn.Module):
        raise EncoderError(f"{where}: the network is {_kind(network)}, not a torch.nn.Module")
    if not isinstance(feature_dim, int) or isinstance(feature_dim, bool) or feature_dim < 1:
        raise EncoderError(f"{where}: feature_dim is {feature_dim!r}, not a positive integer")
    image_size, preprocessing = _wanted(wanted, where)
    return Headless(network.to("cpu", torch.float32), feature_dim, preprocessing, image_size)


def _wanted(wanted: object, where: str) -> tuple[int, Preprocessing]:
    if not isinstance(wanted, Mapping):
        raise EncoderError(f"{where}: preprocessing is {_kind(wanted)}, not a dictionary")
    unknown = [str(key) for key in wanted if key not in _KEYS]
    if unknown:
        raise EncoderError(f"{where}: preprocessing has {unknown[0]!r}; it has {', '.join(_KEYS)}")
    size = wanted.get("image_size", 224)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise EncoderError(f"{where}: image_size is {size!r}, not a positive integer")
    try:
        return size, Preprocessing(
            wanted.get("filter", IMAGENET.filter),
            _three(wanted.get("mean", IMAGENET.mean)),
            _three(wanted.get("std", IMAGENET.std)),
        )
    except (ValueError, TypeError) as error:
        raise EncoderError(f"{where}: preprocessing: {error}") from None


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def _kind(value: object) -> str:
    size = f" of {len(value)}" if isinstance(value, tuple) else ""
    return f"{type(value).__name__}{size}"


def _reason(code: CodeFile, error: BaseException) -> str:
    """The error in one line, with the last line of the file that it went through."""
    text = next(iter(str(error).splitlines()), "")
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == str(code.path)
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return named if line is None else f"line {line}: {named}"
