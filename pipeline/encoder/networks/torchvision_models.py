"""torchvision's classifiers, without PyTorch's compiler, which nothing here uses."""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import ModuleType

from train.torch_import import without_compiler


def classifiers() -> ModuleType:
    """`torchvision.models`."""
    if "torchvision" not in sys.modules:
        # A later torchvision may need more of the compiler than functions. The import then fails
        # here, and succeeds below together with the compiler.
        with contextlib.suppress(ImportError), without_compiler():
            importlib.import_module("torchvision")
    return importlib.import_module("torchvision.models")
