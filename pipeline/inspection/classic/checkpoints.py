"""The tutorial's checkpoints: the state dicts of its encoder and its decoder.

    encoder   resnet.0 … resnet.7   a ResNet's children in turn: conv1, bn1, relu, maxpool, layer1 …
              linear, bn            (E, D) projection of the pooled features, and its BatchNorm
    decoder   embed                 (W, E) one vector for each word
              lstm                  reads the photo, then <start>, then the words
              linear                (W, H) gives the logits

A decoder of ours has the same parts under other names. `CaptionDecoder` says how it reads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from pipeline.inspection.classic.errors import ClassicError
from pipeline.inspection.kinds import Kind, kind_of

_RESNET = "resnet."
_CHILDREN = {0: "conv1", 1: "bn1", 4: "layer1", 5: "layer2", 6: "layer3", 7: "layer4"}
# A ResNet by the blocks of its four layers and by the shapes of the first block's convolutions.
_BASIC, _BOTTLENECK = (64, 64, 3, 3), (64, 64, 1, 1)
_RESNETS = {
    ((2, 2, 2, 2), _BASIC, (64, 64, 3, 3)): "resnet18",
    ((3, 4, 6, 3), _BASIC, (64, 64, 3, 3)): "resnet34",
    ((3, 4, 6, 3), _BOTTLENECK, (64, 64, 3, 3)): "resnet50",
    ((3, 4, 23, 3), _BOTTLENECK, (64, 64, 3, 3)): "resnet101",
    ((3, 8, 36, 3), _BOTTLENECK, (64, 64, 3, 3)): "resnet152",
    ((3, 4, 6, 3), (128, 64, 1, 1), (128, 4, 3, 3)): "resnext50_32x4d",
    ((3, 4, 23, 3), (256, 64, 1, 1), (256, 8, 3, 3)): "resnext101_32x8d",
    ((3, 4, 23, 3), (256, 64, 1, 1), (256, 4, 3, 3)): "resnext101_64x4d",
    ((3, 4, 6, 3), (128, 64, 1, 1), (128, 128, 3, 3)): "wide_resnet50_2",
    ((3, 4, 23, 3), (128, 64, 1, 1), (128, 128, 3, 3)): "wide_resnet101_2",
}
_PROJECTION = {
    "linear.weight": "project.weight",
    "linear.bias": "project.bias",
    "bn.weight": "normalize.weight",
    "bn.bias": "normalize.bias",
    "bn.running_mean": "normalize.running_mean",
    "bn.running_var": "normalize.running_var",
}
_TRACKED = "bn.num_batches_tracked"  # absent in files of PyTorch before 0.4.1, unused here
_WORDS = {
    "embed.weight": "embed.weight",
    "linear.weight": "head.weight",
    "linear.bias": "head.bias",
}
_LSTM_PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@dataclass(frozen=True)
class EncoderFile:
    """What the encoder's checkpoint holds."""

    backbone: str  # torchvision's name of the network
    resnet: dict[str, Tensor]  # by torchvision's names, without the head
    projection: dict[str, Tensor]  # by the names of `CaptionDecoder`, float32

    @property
    def feature_dim(self) -> int:
        return self.projection["project.weight"].shape[1]

    @property
    def embedding_size(self) -> int:
        return self.projection["project.weight"].shape[0]


@dataclass(frozen=True)
class DecoderFile:
    """What the decoder's checkpoint holds."""

    tensors: dict[str, Tensor]  # by the names of `CaptionDecoder`, float32
    num_layers: int

    @property
    def vocab_size(self) -> int:
        return self.tensors["embed.weight"].shape[0]

    @property
    def embedding_size(self) -> int:
        return self.tensors["embed.weight"].shape[1]

    @property
    def hidden_size(self) -> int:
        return self.tensors["lstm.weight_hh_l0"].shape[1]


def read_encoder(path: Path) -> EncoderFile:
    """Raises ClassicError if a file is not the encoder's checkpoint.

    Only the shapes by which a ResNet is recognized are looked at; `load_backbone` checks the rest.
    """
    state = _read_state(path)
    if "embed.weight" in state:
        raise ClassicError(f"{path}: is a decoder's checkpoint; name it with --decoder")
    resnet = {key: tensor for key, tensor in state.items() if key.startswith(_RESNET)}
    others = {key: tensor for key, tensor in state.items() if key not in resnet}
    backbone, renamed = _as_torchvision(path, resnet)
    tracked = {_TRACKED: others.pop(_TRACKED, torch.zeros((), dtype=torch.int64))}
    size, features = _sizes(path, others, "linear.weight")
    _check_shapes(
        path,
        others,
        {
            "linear.weight": (size, features),
            **dict.fromkeys((key for key in _PROJECTION if key != "linear.weight"), (size,)),
        },
    )
    projection = _renamed(path, others, _PROJECTION)
    projection["normalize.num_batches_tracked"] = tracked[_TRACKED]
    return EncoderFile(backbone, renamed, projection)


def _as_torchvision(path: Path, resnet: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """(name of the ResNet, its tensors by torchvision's names). Raises ClassicError."""
    renamed = {}
    for key, tensor in resnet.items():
        child, _, rest = key.removeprefix(_RESNET).partition(".")
        name = _CHILDREN.get(int(child)) if re.fullmatch(r"[0-9]", child) else None
        if name is None or not rest:
            raise ClassicError(
                f"{path}: not the tutorial's encoder ({key} is none of a ResNet's numbered parts)"
            )
        renamed[f"{name}.{rest}"] = tensor
    blocks = tuple(
        len({key.split(".")[1] for key in renamed if key.startswith(f"layer{layer}.")})
        for layer in range(1, 5)
    )
    first = (
        tuple(renamed[key].shape) if key in renamed else None
        for key in ("layer1.0.conv1.weight", "layer1.0.conv2.weight")
    )
    backbone = _RESNETS.get((blocks, *first))  # type: ignore[arg-type]
    if backbone is None:
        found = "no tensor resnet.…" if not renamed else f"layers of {_list(blocks)} blocks"
        raise ClassicError(
            f"{path}: not the tutorial's encoder with a ResNet of torchvision ({found})"
        )
    return backbone, renamed


def read_decoder(path: Path) -> DecoderFile:
    """Raises ClassicError if a file is not the decoder's checkpoint."""
    state = _read_state(path)
    if any(key.startswith(_RESNET) for key in state):
        raise ClassicError(f"{path}: is an encoder's checkpoint; name it with --encoder")
    words, size = _sizes(path, state, "embed.weight")
    gates, hidden = _sizes(path, state, "lstm.weight_hh_l0")
    layers = 1
    while f"lstm.weight_ih_l{layers}" in state:
        layers += 1
    expected = {
        "embed.weight": (words, size),
        "linear.weight": (words, hidden),
        "linear.bias": (words,),
    }
    for n in range(layers):
        shapes = ((4 * hidden, hidden if n else size), (4 * hidden, hidden), (gates,), (gates,))
        parts = (f"lstm.{part}_l{n}" for part in _LSTM_PARTS)
        expected |= dict(zip(parts, shapes, strict=True))
    _check_shapes(path, state, expected)
    names = {key: _WORDS.get(key, key) for key in expected}
    return DecoderFile(_renamed(path, state, names), layers)


def _read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the prefix of DataParallel."""
    kind = kind_of(path)
    if kind not in (Kind.WEIGHTS, Kind.CHECKPOINT):  # torch.load would warn of other pickles
        raise ClassicError(f"{path}: {_why_not(path, kind)}")
    try:
        with path.open("rb") as file:  # torch opens no name that is not UTF-8
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for other files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnpicklingError):  # its text advises to run the code in the file
            reason = "no state dict, or one with more than tensors in it"
        raise ClassicError(f"{path}: not a checkpoint of the tutorial ({reason[:120]})") from None
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and _is_plain(value) for key, value in state.items()
    ):
        raise ClassicError(f"{path}: not a checkpoint of the tutorial (it holds no state dict)")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _why_not(path: Path, kind: Kind) -> str:
    try:
        path.open("rb").close()
    except OSError as error:
        return f"cannot read ({error.strerror})"
    return f"not a checkpoint of the tutorial (it is {kind.value})"


def _is_plain(value: object) -> bool:
    """Whether a value is a tensor with numbers in it: neither sparse, quantized nor complex."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"  # not `meta`
        and value.layout is torch.strided
        and not value.is_quantized
        and not value.is_complex()
    )


def _sizes(path: Path, state: Mapping[str, Tensor], key: str) -> tuple[int, int]:
    """The shape of a matrix that has to be there. Raises ClassicError."""
    if key not in state:
        raise ClassicError(f"{path}: another layout than the tutorial's (no {key})")
    shape = tuple(state[key].shape)
    if len(shape) != 2 or 0 in shape:
        raise ClassicError(f"{path}: another layout than the tutorial's ({key} is {shape})")
    return shape


def _check_shapes(
    path: Path, state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises ClassicError unless these tensors are there, in these shapes, and no others."""
    for key, shape in expected.items():
        if key not in state:
            raise ClassicError(f"{path}: another layout than the tutorial's (no {key})")
        if tuple(state[key].shape) != shape:
            raise ClassicError(
                f"{path}: another layout than the tutorial's ({key} is "
                f"{tuple(state[key].shape)}, must be {shape})"
            )
    superfluous = [key for key in state if key not in expected]
    if superfluous:
        raise ClassicError(f"{path}: another layout than the tutorial's (it has {superfluous[0]})")


def _renamed(
    path: Path, state: Mapping[str, Tensor], names: Mapping[str, str]
) -> dict[str, Tensor]:
    """These tensors as float32 by other names. Raises ClassicError for NaN and infinity."""
    found = {name: state[key].float().contiguous() for key, name in names.items()}
    for key, name in names.items():
        if not found[name].isfinite().all():
            raise ClassicError(f"{path}: {key} is not finite (NaN or infinity)")
    return found


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
