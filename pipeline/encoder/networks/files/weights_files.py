"""Files with weights: what is read, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.files import tensor_pickles
from pipeline.encoder.networks.files.tensor_pickles import Foreign

_DEPTH = 6  # of dictionaries within dictionaries


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, as they are at one place of a file."""

    place: tuple[str, ...]  # the keys that lead there: none, or ("state_dict",)
    tensors: dict[str, Tensor]
    versions: dict[str, int]  # of modules, by their path; where the file knows them

    @classmethod
    def of(cls, content: dict[Any, Any], place: tuple[str, ...] = ()) -> Self:
        """What is a tensor in a dictionary."""
        # Not content.items(): in a file, an attribute of this name may stand before the method.
        tensors = {str(key): each for key, each in dict.items(content) if isinstance(each, Tensor)}
        return cls(place, tensors, _versions(content))


def existing_file(weights: str, otherwise: str) -> Path:
    """A file. Raises EncoderError if it cannot be had; `otherwise` is added if there is none."""
    path = Path(os.path.expanduser(weights))  # unlike Path.expanduser, leaves ~nobody as it is
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise EncoderError(f"{weights}: no such weights file, {otherwise}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise EncoderError(f"{weights}: cannot read ({reason})") from None
    return path


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name; of several state dicts, those of the largest.

    Raises EncoderError.
    """
    return max(read_state_dicts(path), key=lambda state: len(state.tensors)).tensors


def read_state_dicts(path: Path) -> list[StateDict]:
    """Every state dict in a file, as the file orders them; at least one.

    Reads what `torch.save` and safetensors write: state dicts, checkpoints that contain some, and
    whole networks. Of a file with more than tensors in it, the rest is ignored. Raises
    EncoderError.
    """
    try:
        content = _read(path)
    except Exception as error:  # torch.load and safetensors raise a dozen kinds on a foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "damaged, or of another kind"
        raise EncoderError(f"{path}: not a weights file ({reason[:120]})") from None
    found = list(_state_dicts(content, ()))
    if not found:
        raise EncoderError(f"{path}: holds no state dict")
    return found


def _read(path: Path) -> object:
    if path.suffix == ".safetensors" or _is_safetensors(path):
        from safetensors.torch import load_file

        return load_file(path)
    if _is_torchscript(path):  # torch.load would make a program of it
        raise ValueError("a TorchScript archive; save the network's state_dict() instead")
    with warnings.catch_warnings():
        # Of a network that was saved as an object before 2020, PyTorch compares the source code.
        warnings.simplefilter("ignore")
        return torch.load(
            path, map_location="cpu", pickle_module=tensor_pickles, weights_only=False
        )


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors does, whatever it is called: the length of a JSON
    object, and the object."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[4:] == b"\0\0\0\0{"


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _state_dicts(content: object, place: tuple[str, ...]) -> Iterator[StateDict]:
    """The state dicts in what a file contains, the outer ones first."""
    if isinstance(content, Foreign):
        if "_modules" in content.attributes:
            yield _of_network(content, place)
            return
        content = {**content.items, **content.attributes}
    if not isinstance(content, dict) or len(place) > _DEPTH:
        return
    state = StateDict.of(content, place)
    if state.tensors:
        yield state
    for key, value in dict.items(content):
        if isinstance(key, str):
            yield from _state_dicts(value, (*place, key))


def _versions(content: dict[Any, Any]) -> dict[str, int]:
    """What `torch.nn.Module.state_dict` notes beside the tensors."""
    metadata = getattr(content, "_metadata", None)
    if not isinstance(metadata, dict):
        return {}
    return {
        str(path): facts["version"]
        for path, facts in dict.items(metadata)
        if isinstance(facts, dict) and isinstance(facts.get("version"), int)
    }


def _of_network(network: Foreign, place: tuple[str, ...]) -> StateDict:
    """The state dict of a network that was saved as an object."""
    tensors: dict[str, Tensor] = {}
    left: list[tuple[str, object]] = [("", network)]
    for prefix, module in left:  # grows meanwhile
        if not isinstance(module, Foreign) or prefix.count(".") > 64:  # a module may hold itself
            continue
        for kind in ("_parameters", "_buffers"):
            table = module.attributes.get(kind)
            for name, value in dict.items(table) if isinstance(table, dict) else ():
                if isinstance(value, Tensor):
                    tensors[f"{prefix}{name}"] = value
        table = module.attributes.get("_modules")
        for name, value in dict.items(table) if isinstance(table, dict) else ():
            left.append((f"{prefix}{name}.", value))
    return StateDict(place, tensors, {})
