"""torchvision's classifiers with weights: published ones, or those of a file."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.files.fitting_weights import Taken, best_fit, load_fit, taken
from pipeline.encoder.networks.files.weights_files import (
    StateDict,
    existing_file,
    read_state_dicts,
)
from pipeline.encoder.networks.headless import Headless
from pipeline.encoder.networks.torchvision_models import classifiers
from pipeline.encoder.networks.torchvision_networks import (
    has_one_size,
    headless_network,
    published_preprocessing,
)

# Heads in the middle of GoogLeNet and Inception, for their training alone. They are kept where a
# file has them, because the SHA-256 of its weights has always covered them.
_TRAINING_HEADS = ("aux1", "aux2", "AuxLogits")


def torchvision_network(name: str, weights: str) -> tuple[Headless, Path | None, Taken]:
    """(the network with its weights, their file, what there is to say about them).

    weights: a published name (downloaded once) or a file. A network of one image size has that of
    the weights; see `at_size`. Its tensors share their memory with what was read, unless they had
    to be converted to float32. Raises EncoderError.
    """
    headless = headless_network(name, device="meta")
    states, path = _states(name, weights)
    source = f"{name} {weights}" if path is None else str(path)
    complaint = f"{source}: not weights of {name}"
    states = [_renamed(headless.network, state) for state in states]
    fit, rivals = best_fit(states, headless.network, _TRAINING_HEADS)
    if has_one_size(name) and (size := _image_size(headless.network, fit.tensors)):
        headless = headless_network(name, "meta", size)
        fit, rivals = best_fit(states, headless.network, _TRAINING_HEADS)
    _drop_training_heads(headless.network, fit.tensors)
    load_fit(headless.network, fit, complaint)
    preprocessing, size = published_preprocessing(name, weights)
    if has_one_size(name):
        size = headless.image_size
    headless = dataclasses.replace(headless, preprocessing=preprocessing, image_size=size)
    return headless, path, taken(source, fit, rivals)


def at_size(name: str, headless: Headless, image_size: int) -> Headless:
    """The network for images of another size, if it takes only one.

    A ViT's embeddings of positions are interpolated, as torchvision does it. Raises EncoderError if
    there is no such network.
    """
    if not has_one_size(name) or image_size == headless.image_size:
        return headless
    made = headless_network(name, "meta", image_size)
    state = OrderedDict(headless.network.state_dict())
    if isinstance(made.network, classifiers().VisionTransformer):
        state = classifiers().vision_transformer.interpolate_embeddings(
            image_size, made.network.patch_size, state
        )
    made.network.load_state_dict(state, assign=True)
    return dataclasses.replace(made, preprocessing=headless.preprocessing)


def _states(name: str, weights: str) -> tuple[list[StateDict], Path | None]:
    """(state dicts, the file that they are from; None if published). Raises EncoderError."""
    published = classifiers().get_model_weights(name)
    if weights in published.__members__:
        try:
            state = published[weights].get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: the download has a wrong hash
            raise EncoderError(
                f"cannot download {name} {weights} ({error}); give a file with --weights PATH"
            ) from None
        return [StateDict.of(state)], None
    names = ", ".join(published.__members__) or "none"
    path = existing_file(weights, f"and not a published name of {name} ({names})")
    return read_state_dicts(path), path


class _Carrier:
    """Takes a state dict through torchvision's function that loads a network: it asks published
    weights for one, renames what is old in it, and hands it to the network."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def get_state_dict(self, **options: Any) -> dict[str, Tensor]:
        return dict(self.tensors)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.tensors = state


def _renamed(network: nn.Module, state: StateDict) -> StateDict:
    """With the names of today, where torchvision has a function for it (for DenseNets). What
    modules rename themselves, as those of ViTs do, `load_fit` leaves to them."""
    rename = getattr(sys.modules[type(network).__module__], "_load_state_dict", None)
    if rename is None:
        return state
    carrier = _Carrier(state.tensors)
    rename(model=carrier, weights=carrier, progress=False)
    return dataclasses.replace(state, tensors=carrier.tensors)


def _image_size(network: nn.Module, tensors: dict[str, Tensor]) -> int | None:
    """The size that a ViT's embeddings of positions were trained for, (1, 1 + patches, D)."""
    positions = tensors.get("encoder.pos_embedding")
    patch = getattr(network, "patch_size", None)
    if positions is None or patch is None or positions.dim() != 3:
        return None
    side = math.isqrt(max(0, positions.shape[1] - 1))
    return side * int(patch) if side and side * side == positions.shape[1] - 1 else None


def _drop_training_heads(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Take out the heads that the file lacks, or has for other classes."""
    own = network.state_dict()
    for head in _TRAINING_HEADS:
        names = [name for name in own if name.startswith(f"{head}.")]
        needed = [name for name in names if not name.endswith("num_batches_tracked")]
        if any(n not in tensors or tensors[n].shape != own[n].shape for n in needed):
            setattr(network, head, None)
            for name in [name for name in tensors if name.startswith(f"{head}.")]:
                del tensors[name]
