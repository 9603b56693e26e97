"""Loading a backbone: its weights come from torchvision, from a file, or from a fixed seed."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.encoder.backbone import Backbone, is_within
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.fitting_weights import Taken
from pipeline.encoder.networks.random_weights import random_network
from pipeline.encoder.networks.torchvision_weights import at_size, torchvision_network
from pipeline.encoder.networks.weights_sha256 import weights_sha256

RANDOM = "random"


def load_backbone(name: str, weights: str, image_size: int | None = None) -> Backbone:
    """Build a torchvision classifier, drop its head, load and freeze its weights.

    weights: a torchvision name (`IMAGENET1K_V1`, downloaded once), a file with a state dict
    (`.pth`, `.safetensors`; the head may be missing or have another size; see `docs/backbones.md`),
    or `random` (seeded, with measured BatchNorm statistics). image_size: for a network that takes
    images of one size only; by default that of its weights. The hash of its weights is that without
    another size. The backbone has the whole path of a file, because a relative one would lead
    nowhere from another folder. Raises EncoderError, also for weights that are not finite.
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
