"""From photos to captions: photo files, the frozen encoder, the stages and the command line.

from pipeline import Captioner

loads PyTorch; `import pipeline` alone does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.captioner import Caption, Captioner, CaptionError, Prediction

__all__ = ["Caption", "CaptionError", "Captioner", "ForkError", "Prediction"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("pipeline.captioner"), name)


def _check_neighbours() -> None:
    """Raise ImportError if a file of the user's hides a package that belongs to this one.

    Python looks for modules beside the script first, where a `train.py` is common.
    """
    folder = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    for name in ("cache", "train"):
        spec = importlib.util.find_spec(name)
        found = None if spec is None else spec.origin
        if found is None or os.path.realpath(found) != os.path.join(folder, name, "__init__.py"):
            raise ImportError(
                f"{found or 'a folder'} hides the package {name!r} that `pipeline` needs; give it "
                "another name, or start the script with `python -P`"
            )


_check_neighbours()
