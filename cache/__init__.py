"""The feature cache: an HDF5 file format, its writer, reader, merge and verify. Without torch.

from cache import open_cache
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache.record import CacheError
    from cache.store import FeatureCache, open_cache

_HOME = {"CacheError": "record", "FeatureCache": "store", "open_cache": "store"}

__all__ = ["CacheError", "FeatureCache", "open_cache"]


def __getattr__(name: str) -> Any:
    # Not imported before it is asked for: NumPy takes longer to load than `cap --help` to print.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"cache.{_HOME[name]}"), name)
