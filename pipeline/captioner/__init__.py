"""A trained model at work on photos: from files, from memory, from a cache, and over HTTP.

Its names are imported when they are asked for, because they bring PyTorch; the settings of the
server, which the command line shows, do not need it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from train.torch_import import share_machine

if TYPE_CHECKING:
    from pipeline.captioner.captioner import Captioner
    from pipeline.captioner.forks import ForkError
    from pipeline.captioner.predictions import Caption, CaptionError, Prediction

share_machine()  # before PyTorch is imported, by any module of this package

__all__ = ["Caption", "CaptionError", "Captioner", "ForkError", "Prediction"]

_MODULES = {
    "Caption": "predictions",
    "CaptionError": "predictions",
    "Captioner": "captioner",
    "ForkError": "forks",
    "Prediction": "predictions",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
