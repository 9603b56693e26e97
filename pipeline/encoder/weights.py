"""Loading a backbone: its weights come from torchvision, from a file, or from a fixed seed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.encoder.backbone import Backbone, is_within
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.headless import Headless
from pipeline.encoder.networks.own_network import own_network
from pipeline.encoder.networks.random_weights import random_network
from pipeline.encoder.networks.sources import PRETRAINED, RANDOM, TIMM, CodeFile, code_file
from pipeline.encoder.networks.timm_networks import (
    as_timm_names,
    measure_batchnorm,
    resize_network,
    timm_network,
)
from pipeline.encoder.networks.torchvision_models import classifiers
from pipeline.encoder.networks.torchvision_networks import headless_network
from pipeline.encoder.networks.weights_files import read_weights_file
from pipeline.encoder.networks.weights_sha256 import weights_sha256


def load_backbone(name: str, weights: str, image_size: int | None = None) -> Backbone:
    """Build a network without its head, load and freeze its weights.

    name: of a torchvision classifier, of one of timm's networks (`timm:NAME`), or of a function
    that makes a network (`FILE.py:FUNCTION`), which is then run. image_size: of the photos, where a
    network has to be made for it; None for the network's own.

    weights: a torchvision name (`IMAGENET1K_V1`, downloaded once), or `pretrained` of timm's
    networks, a file with a state dict
    (`.pth`, `.safetensors`; the head may be missing or have another size), or `random` (seeded,
    with measured BatchNorm statistics). The backbone has the whole path of a file, because a
    relative one would lead nowhere from another folder. Raises EncoderError, also for weights that
    are not finite.
    """
    if (code := code_file(name)) is not None:
        return _own_backbone(code, weights)
    if name.startswith(TIMM):
        return _timm_backbone(name, weights, image_size)
    if weights == RANDOM:
        headless, sha256 = random_network(name)
    else:
        headless = headless_network(name, device="meta")
        state, path = _read_weights(name, weights)
        source = f"{name} {weights}" if path is None else str(path)
        _load_strictly(headless.network, state, f"{source}: not weights of {name}")
        _check_finite(headless.network.state_dict(), source)
        sha256 = weights_sha256(headless.network.state_dict())
        weights = weights if path is None else os.path.abspath(path)
    return _frozen(name, weights, sha256, headless)


def _frozen(name: str, weights: str, sha256: str, headless: Headless) -> Backbone:
    headless.network.eval().requires_grad_(False)
    return Backbone(
        name,
        weights,
        sha256,
        headless.feature_dim,
        headless.network,
        headless.preprocessing,
        headless.image_size,
    )


def _timm_backbone(name: str, weights: str, image_size: int | None) -> Backbone:
    """One of timm's networks. The hash is that of its weights as they are before they are resampled
    for `image_size`, and, if they are random, before statistics are measured.
    """
    headless = timm_network(name, pretrained=weights == PRETRAINED)
    network = headless.network
    source = f"{name} {weights}"
    if weights not in (RANDOM, PRETRAINED):
        path = _existing(weights, f"timm's own weights are called {PRETRAINED!r}")
        source, weights = str(path), os.path.abspath(path)
        state = as_timm_names(network, read_weights_file(path))
        _load_strictly(network, state, f"{source}: not weights of {name}")
    _check_finite(network.state_dict(), source)
    sha256 = weights_sha256(network.state_dict())
    if weights == RANDOM:
        measure_batchnorm(network, headless.image_size)
    if image_size not in (None, headless.image_size):
        assert image_size is not None
        resize_network(network, name, image_size)
    return _frozen(name, weights, sha256, headless)


def _own_backbone(code: CodeFile, weights: str) -> Backbone:
    """The network that a function of the user's makes, with the weights that it brings."""
    if weights:
        raise EncoderError(
            f"{code.path}:{code.function} makes a network with its weights; leave out --weights "
            f"{weights}"
        )
    content = code.read()
    headless = own_network(code, content)
    state = headless.network.state_dict()
    _check_finite(state, f"{code.path}:{code.function}")
    return _frozen(code.recorded(content), str(code.path), weights_sha256(state), headless)


def _read_weights(name: str, weights: str) -> tuple[dict[str, Tensor], Path | None]:
    """(state dict, the file that it is from; None if published). Raises EncoderError."""
    published = classifiers().get_model_weights(name)
    if weights in published.__members__:
        try:
            state = published[weights].get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: the download has a wrong hash
            raise EncoderError(
                f"cannot download {name} {weights} ({error}); give a file with --weights PATH"
            ) from None
        return dict(state), None
    names = ", ".join(published.__members__) or "none"
    path = _existing(weights, f"and not a published name of {name} ({names})")
    return read_weights_file(path), path


def _existing(weights: str, otherwise: str) -> Path:
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


def _load_strictly(network: nn.Module, state: Mapping[str, Tensor], complaint: str) -> None:
    """Load every tensor of the headless network, as float32. Other tensors (the head) are ignored.

    Raises EncoderError, whose message starts with `complaint`, if a tensor is missing or has
    another shape, or if there are many others.
    """
    own = network.state_dict()
    loaded = {}
    for key, tensor in own.items():
        if key not in state:
            if key.endswith("num_batches_tracked"):  # absent in old files, unused when frozen
                loaded[key] = torch.zeros((), dtype=torch.int64)
                continue
            raise EncoderError(f"{complaint} (no {key})")
        given = state[key]
        if given.shape != tensor.shape:
            raise EncoderError(
                f"{complaint} ({key} is {tuple(given.shape)}, must be {tuple(tensor.shape)})"
            )
        loaded[key] = given.to(tensor.dtype).contiguous()
    if len(state) > len(own) + 16:
        raise EncoderError(f"{complaint} (it has {len(state)} tensors, the network {len(own)})")
    network.load_state_dict(loaded, assign=True)


def _check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise EncoderError if a weight is NaN or infinite, as after a training that diverged.

    The network's own output would not show it: a ReLU of oneDNN makes 0 of NaN.
    """
    for key, tensor in state.items():
        if tensor.is_floating_point() and not is_within(tensor, torch.finfo(tensor.dtype).max):
            raise EncoderError(
                f"{source}: {key} is not finite (NaN or infinity), as after a training that "
                "diverged; use other weights"
            )
