"""Loading a backbone: its weights come from torchvision, from a file, or from a fixed seed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.encoder.backbone import Backbone, EncoderError, headless_network, is_within
from pipeline.encoder.batchnorm import BATCHNORMS, has_batchnorm
from pipeline.encoder.torchvision_models import classifiers

RANDOM = "random"

_RANDOM_SEED = 0
_CALIBRATION_IMAGES = 8


def load_backbone(name: str, weights: str) -> Backbone:
    """Build a torchvision classifier, drop its head, load and freeze its weights.

    weights: a torchvision name (`IMAGENET1K_V1`, downloaded once), a file with a state dict
    (`.pth`, `.safetensors`; the head may be missing or have another size), or `random` (seeded,
    with measured BatchNorm statistics). The backbone has the whole path of a file, because a
    relative one would lead nowhere from another folder. Raises EncoderError, also for weights that
    are not finite.
    """
    if weights == RANDOM:
        network, feature_dim, sha256 = _random_network(name)
    else:
        network, feature_dim = headless_network(name, device="meta")
        state, path = _read_weights(name, weights)
        source = f"{name} {weights}" if path is None else str(path)
        _load_strictly(network, state, f"{source}: not weights of {name}")
        _check_finite(network.state_dict(), source)
        sha256 = _sha256(network.state_dict())
        weights = weights if path is None else os.path.abspath(path)
    network.eval().requires_grad_(False)
    return Backbone(name, weights, sha256, feature_dim, network)


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
    path = Path(os.path.expanduser(weights))  # unlike Path.expanduser, leaves ~nobody as it is
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        names = ", ".join(published.__members__) or "none"
        raise EncoderError(
            f"{weights}: no such weights file, and not a published name of {name} ({names})"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise EncoderError(f"{weights}: cannot read ({reason})") from None
    return read_weights_file(path), path


def read_weights_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict's file by name. Raises EncoderError."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and safetensors raise a dozen kinds on a foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnpicklingError):  # its text advises to run the code in the file
            reason = "no state dict, or one with more than tensors in it"
        raise EncoderError(f"{path}: not a weights file ({reason[:120]})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise EncoderError(f"{path}: holds no state dict")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


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


def _random_network(name: str) -> tuple[nn.Module, int, str]:
    """(network, feature_dim, hash): seeded weights, BatchNorm statistics measured on seeded images.

    With BatchNorm's initial statistics, the activations of a deep ResNet grow beyond float16 (5e7
    at depth 152). Measured statistics may differ in the last bit between machines, so the hash
    covers the seeded weights alone. Residual branches have the scale that training gives them; see
    `_scale_branches`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        network, feature_dim = headless_network(name, device="cpu")
        _scale_branches(network)
        sha256 = _sha256(network.state_dict())
        # Coarse noise, enlarged: like photos, it has structure at every scale.
        coarse = torch.randn(_CALIBRATION_IMAGES, 3, 14, 14)
        images = nn.functional.interpolate(coarse, (224, 224), mode="bicubic")
        for module in network.modules():
            if isinstance(module, BATCHNORMS):
                module.momentum = None  # the plain average over all passes, here over one
        if has_batchnorm(network):
            with torch.no_grad():
                network.train()(images)
    return network, feature_dim, sha256


def _scale_branches(network: nn.Module) -> None:
    """Let each of a ResNet's L residual branches add 1/L of the variance of the blocks' input.

    De and Smith (2020) find that in trained residual networks the branches are about 1/√L as large
    as the shortcuts. With branches of full size a ResNet-152 is chaotic: rounding its input to
    bfloat16 alone turns the features of some photos by a tenth, which no trained network does.
    """
    resnet = classifiers().resnet
    lasts = [
        block.bn3 if isinstance(block, resnet.Bottleneck) else block.bn2
        for block in network.modules()
        if isinstance(block, (resnet.BasicBlock, resnet.Bottleneck))
    ]
    for batchnorm in lasts:
        nn.init.constant_(batchnorm.weight, len(lasts) ** -0.5)


def _sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes and float32 bytes, sorted by name. It is independent of the format of
    the file that the tensors come from."""
    digest = hashlib.sha256()
    for key in sorted(state):
        if not key.endswith("num_batches_tracked"):
            tensor = state[key].detach().contiguous()
            digest.update(f"{key} {tuple(tensor.shape)};".encode())
            digest.update(tensor.numpy().data)
    return digest.hexdigest()
