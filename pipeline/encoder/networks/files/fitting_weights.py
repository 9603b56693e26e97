"""Finding a network's tensors in a file that somebody's training has written, and loading them.

Trainings put the network's tensors below keys of their own (`state_dict`, `model_ema`) and put the
names of modules around it in front (`module.`, `model.backbone.`). Nothing here goes by a list of
such names: what counts is how many of the network's tensors are found, with their shapes.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.files.weights_files import StateDict

# Modules around others that keep their names: of DataParallel, torch.compile, FSDP and activation
# checkpointing. They may be anywhere in a name.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Averages of weights over a training, as their authors call them.
_AVERAGES = re.compile(r"(?:^|_)(?:ema|swa|teacher|averaged?)(?:_|\d|$)", re.IGNORECASE)
_MOST_FOREIGN = 16  # tensors beside the network's own, among its own modules


@dataclass(frozen=True)
class Fit:
    """Tensors of a file under the network's own names, and others beside them."""

    place: tuple[str, ...]  # of the state dict in the file
    prefix: str  # in front of the names, without wrappers: "model.backbone."
    count: int  # of the network's tensors that are there, with their shapes
    complete: bool
    tensors: dict[str, Tensor]
    versions: dict[str, int]

    @property
    def where(self) -> str:
        """Where they were found, for people; empty if the file is just these tensors."""
        names = [f"{self.prefix}*"] if self.prefix else []
        return " / ".join([*self.place, *names])

    @property
    def is_average(self) -> bool:
        return any(_AVERAGES.search(part) for part in (*self.place, *self.prefix.split(".")))


def best_fit(
    states: Sequence[StateDict], network: nn.Module, optional: Sequence[str] = ()
) -> tuple[Fit, list[Fit]]:
    """(the tensors of a file that fit best, others that fit as well and have other numbers).

    Of several that fit as well, it is an average of weights, which is what trainings are judged by;
    or else the first. optional: modules that need not be there.
    """
    own = {
        name: tensor.shape
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked") and name.split(".")[0] not in optional
    }
    spellings = _spellings(network, own)
    fits: list[Fit] = []
    for state in states:
        tensors = _without_wrappers(state.tensors, own)
        counts = Counter(
            (number, name.removesuffix(spelled))
            for name, tensor in tensors.items()
            for spelled in _endings(name)
            for number, spelling in enumerate(spellings)
            if own.get(spelling(spelled)) == tensor.shape
        )
        if not counts:
            fits.append(_fit(state, tensors, "", spellings[0], 0, len(own)))
        most = max(counts.values(), default=0)
        prefixes = set[str]()
        for (number, prefix), count in sorted(counts.items(), key=lambda item: item[0][0]):
            if count == most and prefix not in prefixes:
                prefixes.add(prefix)
                fits.append(_fit(state, tensors, prefix, spellings[number], count, len(own)))
    best = max(fits, key=lambda fit: (fit.count, fit.is_average))  # the first of equals
    rivals = [
        fit
        for fit in fits
        if fit is not best and fit.complete and not _same(fit.tensors, best.tensors, own)
    ]
    return best, rivals


def load_fit(network: nn.Module, fit: Fit, complaint: str) -> None:
    """Give the network the tensors of a fit, as float32. Others beside them (heads) are ignored.

    The network may be on the meta device. Its modules rename what older versions of them saved.
    Raises EncoderError, whose message starts with `complaint`, if a tensor is missing or has
    another shape, or if many others are among the network's own modules.
    """
    own = network.state_dict()
    given = OrderedDict(
        (name, tensor.to(_dtype(own.get(name), tensor)).contiguous())
        for name, tensor in fit.tensors.items()
    )
    versions = dict(fit.versions)
    if "" not in versions:  # such as in a .safetensors file
        fits = all(t.shape == own[name].shape for name, t in given.items() if name in own)
        versions[""] = getattr(network, "_version", 1) if fits else 1
    metadata = OrderedDict((path, {"version": version}) for path, version in versions.items())
    setattr(given, "_metadata", metadata)  # noqa: B010 # where load_state_dict looks for it
    try:
        with warnings.catch_warnings():
            if versions[""] != getattr(network, "_version", 1):
                warnings.simplefilter("ignore")  # an old MNASNet advises to train it anew
            result = network.load_state_dict(given, strict=False, assign=True)
    except RuntimeError as error:
        for name, tensor in given.items():
            if name in own and tensor.shape != own[name].shape:
                shapes = f"{tuple(tensor.shape)}, must be {tuple(own[name].shape)}"
                raise EncoderError(f"{complaint} ({fit.prefix}{name} is {shapes})") from None
        reason = str(error).splitlines()[-1].strip()
        raise EncoderError(f"{complaint} ({reason[:200]})") from None
    counters = {name for name in result.missing_keys if name.endswith("num_batches_tracked")}
    for name in result.missing_keys:
        if name not in counters:
            raise EncoderError(f"{complaint} (no {fit.prefix}{name})")
    if counters:  # absent in old files, unused when frozen
        zeros = {name: torch.zeros((), dtype=torch.int64) for name in counters}
        network.load_state_dict(zeros, strict=False, assign=True)
    parts = {name.split(".")[0] for name in own}
    foreign = [name for name in result.unexpected_keys if name.split(".")[0] in parts]
    if len(foreign) > _MOST_FOREIGN:
        first = ", ".join(f"{fit.prefix}{name}" for name in foreign[:3])
        raise EncoderError(f"{complaint} (it has {len(foreign)} tensors more: {first}, …)")


@dataclass(frozen=True)
class Taken:
    """What there is to say about where in a file weights were found."""

    notices: tuple[str, ...] = ()  # others would have fitted, too
    details: tuple[str, ...] = ()  # ask for nothing


def taken(source: str, fit: Fit, rivals: Sequence[Fit]) -> Taken:
    if rivals:
        others = ", ".join(each.where or "its outermost tensors" for each in rivals)
        place = fit.where or "its outermost tensors"
        return Taken(notices=(f"{source}: weights taken from {place}; {others} would fit, too",))
    return Taken(details=(f"{source}: weights taken from {fit.where}",)) if fit.where else Taken()


def _fit(
    state: StateDict,
    tensors: dict[str, Tensor],
    prefix: str,
    spelling: Callable[[str], str],
    count: int,
    needed: int,
) -> Fit:
    """The tensors below a prefix."""
    below = {
        spelling(name.removeprefix(prefix)): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    # A part of a network, or a sequence of its parts, has versions of its own.
    versions = (
        {}
        if spelling is not str
        else {
            _unwrapped(path + ".").removeprefix(prefix).rstrip("."): version
            for path, version in state.versions.items()
            if _unwrapped(path + ".").startswith(prefix) or not prefix
        }
    )
    return Fit(state.place, prefix, count, count == needed, below, versions)


def _spellings(network: nn.Module, own: dict[str, torch.Size]) -> list[Callable[[str], str]]:
    """Functions from a name in a file to the network's own name, the usual ones first.

    Besides the own names: the numbers of `nn.Sequential(*network.children())`, as tutorials cut off
    a head; and the names in the only part with tensors, such as `features`.
    """
    children = {str(number): name for number, (name, _) in enumerate(network.named_children())}

    def numbered(name: str) -> str:
        first, _, rest = name.partition(".")
        return f"{children.get(first, first)}.{rest}"

    spellings: list[Callable[[str], str]] = [str, numbered]
    parts = {name.split(".")[0] for name in own}
    if len(parts) == 1:
        (part,) = parts
        spellings.append(lambda name: f"{part}.{name}")
    return spellings


def _endings(name: str) -> Iterator[str]:
    """`a.b.c` → `a.b.c`, `b.c`, `c`."""
    while name:
        yield name
        name = name.partition(".")[2]


def _without_wrappers(tensors: dict[str, Tensor], own: dict[str, torch.Size]) -> dict[str, Tensor]:
    if any(part in _WRAPPERS for name in own for part in name.split(".")):
        return tensors
    return {_unwrapped(name): tensor for name, tensor in tensors.items()}


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _dtype(own: Tensor | None, given: Tensor) -> torch.dtype:
    if own is not None:
        return own.dtype
    return torch.float32 if given.is_floating_point() else given.dtype


def _same(
    first: dict[str, Tensor], second: dict[str, Tensor], names: dict[str, torch.Size]
) -> bool:
    return all(
        name in first and name in second and torch.equal(first[name], second[name])
        for name in names
    )
