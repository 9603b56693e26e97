"""The import of PyTorch and torchvision: what is set before it, what is left out of it, and what
runs beside it.

PyTorch takes most of the time in which a command starts, and much of that goes into parts that
nothing here uses. Whatever is left out is imported in full when it is asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cache.share import cores, cores_in_mask

if TYPE_CHECKING:
    import torch

# Each of these sets how OpenMP's threads wait. GNU's library reads the first two, Intel's and
# LLVM's read the others.
_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# Fewer than these let threads sleep in the middle of a step, which costs more than the spin: on two
# cores without bfloat16, 1,000 took 14 to 24% longer alone than OpenMP's own 300,000. Medians of
# runs in turns, alone and beside two busy processes: 10,000 spins 8.9 and 17.6 s, 20,000 9.1 and
# 20.2 s, 300,000 8.8 and 51 s.
_SPINS = "10000"
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")

_META_KERNELS = "torch._meta_registrations"
_COMPILER, _COMPILER_UTILS = "torch._dynamo", "torch._dynamo.utils"


def spin_briefly() -> None:
    """Let waiting threads give up their core soon, unless the user's environment says otherwise.

    GNU's OpenMP spins for milliseconds first. On a busy machine the thread that the others wait for
    may have no core during that time. Beside two busy processes on two cores, training took 4 to 50
    times as long as alone; with a short spin, twice as long. Alone the difference is lost in noise.

    OpenMP reads its settings when PyTorch is imported, so call this before. Child processes inherit
    the setting.
    """
    if not any(name in os.environ for name in _SETTINGS):
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def share_machine() -> None:
    """Compute as somebody who is not alone on the machine.

    Does nothing once PyTorch is imported, because OpenMP has then read its settings.
    """
    if "torch" not in sys.modules:
        spin_briefly()
        use_share_of_cores()


def use_share_of_cores() -> None:
    """Let PyTorch start as many threads as a quota of cores allows, unless the user has said.

    PyTorch obeys the affinity mask by itself, but knows nothing of a cgroup's quota. Threads beyond
    the quota use it up early in each period, and then all stand still until the next. OpenMP reads
    its settings when PyTorch is imported, so call this before. Child processes inherit the setting.
    """
    usable = cores()
    if usable < cores_in_mask() and not any(name in os.environ for name in _THREADS):
        os.environ["OMP_NUM_THREADS"] = str(usable)


def start_torch(device: str) -> None:
    """Import PyTorch, and meanwhile let the GPU's driver make a context.

    For a process of our own, before anything else imports torch. device: as for `resolve_device`;
    a name that is wrong is none of this function's business.
    """
    if device.strip() != "cpu":
        threading.Thread(target=_make_context, args=(device,), daemon=True).start()
    import_torch()


def import_torch() -> None:
    """Import PyTorch without its kernels for the meta device that are written in Python.

    They are three tenths of the import, because they bring all decompositions and reference
    implementations along. Nothing of ours uses them. PyTorch's compiler and FSDP do, and cannot be
    imported without them: call `import_meta_kernels` before code that may import these. Does
    nothing if PyTorch is imported already.
    """
    if "torch" in sys.modules:
        return
    left_out = ModuleType(_META_KERNELS)
    # A later PyTorch may use the module while it is imported.
    left_out.__getattr__ = _true_meta_kernel  # type: ignore[method-assign]
    sys.modules[_META_KERNELS] = left_out
    try:
        torch = importlib.import_module("torch")
    finally:
        if sys.modules.get(_META_KERNELS) is left_out:
            del sys.modules[_META_KERNELS]
    name = _META_KERNELS.removeprefix("torch.")
    if vars(torch).get(name) is left_out:
        delattr(torch, name)


def import_meta_kernels() -> None:
    """Import what `import_torch` has left out."""
    importlib.import_module(_META_KERNELS)


def seeded_generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator of random numbers on this device.

    PyTorch 2.14 refuses to make one before a module is imported that `import_torch` leaves out.
    """
    import torch

    try:
        return torch.Generator(device).manual_seed(seed)
    except RuntimeError:
        with contextlib.suppress(ImportError):  # of another version
            importlib.import_module("torch._prims.rng_prims")
        return torch.Generator(device).manual_seed(seed)


def _true_meta_kernel(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if "__getattr__" in vars(sys.modules[_META_KERNELS]):
        del sys.modules[_META_KERNELS]
    return getattr(importlib.import_module(_META_KERNELS), name)


def _make_context(device: str) -> None:
    """Make the context of a GPU that PyTorch will use: its primary one.

    It takes some tenths of a second, in which Python's lock is free. Without a driver or a GPU
    nothing happens. PyTorch finds and reports whatever fails here. The functions and their
    arguments are those of CUDA's driver interface, cuInit and cuDevicePrimaryCtxRetain.
    """
    first = device.split(",")[0].strip()
    kind, _, index = first.partition(":")
    if kind not in ("auto", "cuda") or not (index or "0").isdecimal():
        return
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        number, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(number), int(index or 0)) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Within this context, importing functions of `torch._dynamo.utils` does not import PyTorch's
    compiler, which they do when they are called.

    `torchvision.ops.roi_align` imports one such function and calls it much later, if at all. timm
    decorates functions that are not to be compiled, with `torch.compiler.disable`; they stay as
    they are. The compiler takes longer to import than torchvision and everything else together: 0.7
    of the 3 s in which `cap predict` captions a photo. Nothing changes if the compiler is imported
    already. Importing anything else of the compiler raises ImportError; import again outside of the
    context.
    """
    if _COMPILER in sys.modules:
        yield
        return
    package, utils = ModuleType(_COMPILER), ModuleType(_COMPILER_UTILS)
    package.__path__ = []  # a package with nothing else in it
    package.disable = _undecorated  # type: ignore[attr-defined]
    utils.__getattr__ = _called_later  # type: ignore[method-assign]
    sys.modules |= {_COMPILER: package, _COMPILER_UTILS: utils}
    try:
        yield
    finally:
        del sys.modules[_COMPILER], sys.modules[_COMPILER_UTILS]


def _undecorated(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """Instead of `torch._dynamo.disable`: the function itself, or a decorator that returns it."""
    return _undecorated if function is None else function


def _called_later(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(_COMPILER_UTILS), name)(*arguments, **options)

    return call
