"""Pickles of PyTorch that hold more than tensors, read for their tensors alone.

A checkpoint often has objects of other libraries beside its weights: settings, callbacks, the
optimizer, or a whole network. `torch.load(weights_only=True)` refuses such a file. Here, an object
of any other class becomes a `Foreign` one. No class or function that a file names is imported,
called or changed, so that nothing in it can run. Used as `pickle_module` of `torch.load`.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import IO, Any

import torch
from torch import Tensor


class Foreign:
    """Stands for an object of a class that is not imported. Keeps its attributes and its items."""

    dump_patches = False  # PyTorch asks this of networks in files that are older than 2020

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.attributes: dict[str, Any] = {}
        self.items: dict[Any, Any] = {}

    def __new__(cls, *arguments: Any, **options: Any) -> Foreign:
        made = super().__new__(cls)
        made.__init__()  # type: ignore[misc] # the pickle of an object does not call it
        return made

    def __setstate__(self, state: object) -> None:
        for part in state if isinstance(state, tuple) else (state,):  # two parts with __slots__
            if isinstance(part, dict):
                self.attributes.update(part)

    def __setitem__(self, key: object, value: object) -> None:
        self.items[key] = value

    def append(self, item: object) -> None:
        """An item of a list, which holds no weights."""

    add = append

    def extend(self, items: Iterable[object]) -> None:
        """Items of a list."""


class _Constructor:
    """What a file may call. It has no attributes that a file could change."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Any:
        raise NotImplementedError


class _Tensor(_Constructor):
    def __call__(
        self, storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any
    ) -> Tensor:
        """A tensor of a storage, with its strides. rest: about gradients and hooks."""
        return torch.empty(0, dtype=storage.dtype).set_(storage, offset, size, stride)


class _TensorOfDtype(_Constructor):
    def __call__(
        self,
        storage: Any,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool,
        hooks: object,
        dtype: torch.dtype,
        *rest: Any,
    ) -> Tensor:
        """A tensor of a dtype that has no storages of its own."""
        return torch.empty(0, dtype=dtype).set_(storage.untyped(), offset, size, stride)


class _Parameter(_Constructor):
    def __call__(self, data: object, *rest: Any) -> object:
        return data


class _Subclass(_Constructor):
    def __call__(self, make: object, kind: object, arguments: tuple[Any, ...], *rest: Any) -> Any:
        """A tensor of a subclass, or one with attributes: the plain tensor."""
        return make(*arguments) if isinstance(make, _Constructor) else Foreign()


class _Size(_Constructor):
    def __call__(self, sizes: Iterable[int] = ()) -> tuple[int, ...]:
        return tuple(sizes)


# By the names in files, of functions and classes in modules of PyTorch.
_CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor": _Tensor(),
    "_rebuild_tensor_v2": _Tensor(),
    "_rebuild_tensor_v3": _TensorOfDtype(),
    "_rebuild_parameter": _Parameter(),
    "_rebuild_parameter_with_state": _Parameter(),
    "_rebuild_from_type_v2": _Subclass(),
    "Parameter": _Parameter(),
    "Size": _Size(),
}


class Unpickler(pickle.Unpickler):
    """Knows tensors and dictionaries; everything else is `Foreign`."""

    def find_class(self, module: str, name: str) -> Any:
        """What a file means by a name. Nothing is imported for it."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" or module.startswith("torch."):
            known = vars(torch).get(name)
            if module == "torch" and isinstance(known, torch.dtype):
                return known
            if name in _CONSTRUCTORS:
                return _CONSTRUCTORS[name]
        return Foreign


def load(file: IO[bytes], **options: Any) -> Any:
    """One pickle of a file. Of older files, PyTorch asks for several."""
    return Unpickler(file, **options).load()
