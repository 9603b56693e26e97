"""Loading a backbone: its weights come from torchvision, from a file, or from a fixed seed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.encoder.backbone import Backbone, is_within
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.files.fitting_weights import Taken, best_fit, load_fit, taken
from pipeline.encoder.networks.files.weights_files import (
    StateDict,
    existing_file,
    read_state_dicts,
)
from pipeline.encoder.networks.headless import Headless
from pipeline.encoder.networks.own_network import own_network
from pipeline.encoder.networks.random_weights import random_network
from pipeline.encoder.networks.sources import PRETRAINED, RANDOM, TIMM, CodeFile, code_file
from pipeline.encoder.networks.stages import STAGES, with_stages
from pipeline.encoder.networks.timm_networks import (
    as_timm_names,
    measure_batchnorm,
    resize_network,
    timm_network,
)
from pipeline.encoder.networks.torchvision_weights import at_size, torchvision_network
from pipeline.encoder.networks.weights_sha256 import weights_sha256

_NOTHING = Taken()


def load_backbone(name: str, weights: str, image_size: int | None = None) -> Backbone:
    """Build a network without its head, load and freeze its weights.

    name: of a torchvision classifier, of one of timm's networks (`timm:NAME`), or of a function
    that makes a network (`FILE.py:FUNCTION`), which is then run; the first two may end in
    `+stages`, see `networks.stages`. image_size: of the photos, where a
    network has to be made for it; None for the network's own.

    weights: a torchvision name (`IMAGENET1K_V1`, downloaded once), or `pretrained` of timm's
    networks, a file with a state dict (`.pth`, `.safetensors`, checkpoints of trainings; the head
    may be missing or have another size; see `docs/backbones.md`), or `random` (seeded, with
    measured BatchNorm statistics). The backbone has the whole path of a file, because a
    relative one would lead nowhere from another folder. Raises EncoderError, also for weights that
    are not finite.
    """
    plain = name.removesuffix(STAGES)
    if (code := code_file(plain)) is not None:
        if plain != name:
            raise EncoderError(f"{plain}: makes its own vector; leave out {STAGES}")
        return _own_backbone(code, weights)
    of_timm = plain.startswith(TIMM)
    make = _timm_backbone if of_timm else _torchvision_backbone
    backbone = make(plain, weights, image_size)
    return backbone if plain == name else with_stages(backbone)


def _torchvision_backbone(name: str, weights: str, image_size: int | None) -> Backbone:
    """One of torchvision's classifiers. The hash is that of its weights as they are before a ViT's
    are resampled for `image_size`, and, if they are random, before statistics are measured.
    """
    said = Taken()
    if weights == RANDOM:
        headless, sha256 = random_network(name)
    else:
        headless, path, said = torchvision_network(name, weights)
        source = f"{name} {weights}" if path is None else str(path)
        _check_finite(headless.network.state_dict(), source)
        sha256 = weights_sha256(headless.network.state_dict())
        weights = weights if path is None else os.path.abspath(path)
    if image_size is not None:
        headless = at_size(name, headless, image_size)
    return _frozen(name, weights, sha256, headless, said)


def _frozen(
    name: str, weights: str, sha256: str, headless: Headless, said: Taken = _NOTHING
) -> Backbone:
    headless.network.eval().requires_grad_(False)
    return Backbone(
        name,
        weights,
        sha256,
        headless.feature_dim,
        headless.network,
        headless.preprocessing,
        headless.image_size,
        said.notices,
        said.details,
    )


def _timm_backbone(name: str, weights: str, image_size: int | None) -> Backbone:
    """One of timm's networks. The hash is that of its weights as they are before they are resampled
    for `image_size`, and, if they are random, before statistics are measured.
    """
    headless = timm_network(name, pretrained=weights == PRETRAINED)
    network = headless.network
    source, said = f"{name} {weights}", Taken()
    if weights not in (RANDOM, PRETRAINED):
        path = existing_file(weights, f"timm's own weights are called {PRETRAINED!r}")
        source, weights = str(path), os.path.abspath(path)
        states = read_state_dicts(path)
        fit, rivals = best_fit(states, network)
        if not fit.complete:  # perhaps its authors called the tensors otherwise
            stripped = StateDict(fit.place, fit.tensors, fit.versions)
            fit, rivals = best_fit(
                [
                    replace(state, tensors=as_timm_names(network, state.tensors))
                    for state in (stripped, *states)
                ],
                network,
            )
        load_fit(network, fit, f"{source}: not weights of {name}")
        said = taken(source, fit, rivals)
    _check_finite(network.state_dict(), source)
    sha256 = weights_sha256(network.state_dict())
    if weights == RANDOM:
        measure_batchnorm(network, headless.image_size)
    if image_size not in (None, headless.image_size):
        assert image_size is not None
        resize_network(network, name, image_size)
    return _frozen(name, weights, sha256, headless, said)


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
