"""torchvision's classifiers, without torch's compiler, which nothing here uses.

One of their neighbours, `torchvision.ops.roi_align`, takes one function from `torch._dynamo` that
it calls much later. To import that package takes longer than torchvision and all else together:
0.7 s of the 3 s in which `cap predict` captions a photo. So while torchvision is imported something
else stands in its place, whose functions look the true ones up when they are called.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

_PACKAGE, _MODULE = "torch._dynamo", "torch._dynamo.utils"


def classifiers() -> ModuleType:
    """`torchvision.models`."""
    if "torchvision" not in sys.modules and _PACKAGE not in sys.modules:
        # What a torchvision to come may want beyond functions, it gets below.
        with contextlib.suppress(ImportError), _compiler_later():
            importlib.import_module("torchvision")
    return importlib.import_module("torchvision.models")


@contextlib.contextmanager
def _compiler_later() -> Iterator[None]:
    package, module = ModuleType(_PACKAGE), ModuleType(_MODULE)
    package.__path__ = []  # a package, without anything else in it
    module.__getattr__ = _later  # type: ignore[method-assign]
    sys.modules |= {_PACKAGE: package, _MODULE: module}
    try:
        yield
    finally:
        del sys.modules[_PACKAGE], sys.modules[_MODULE]


def _later(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(_MODULE), name)(*arguments, **options)

    return call
