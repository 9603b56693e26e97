"""The frozen backbone: a network without its head.

The network as torchvision builds it, in float32, is the reference. What runs is the same network
with its convolutions fused (`fused_convolutions`), channels last in memory, in a chosen precision.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pipeline.encoder.errors import EncoderError, PrecisionError
from pipeline.encoder.fusion.batchnorm import fold_batchnorm
from pipeline.encoder.fusion.fused_convolutions import fuse_convolutions
from pipeline.encoder.shapes import run_on_meta
from pipeline.photos.preprocessing import IMAGENET, Preprocessing
from train.device import is_out_of_memory

# The batch size for which the weights are laid out in memory. Any other size works, too.
_TYPICAL_BATCH = 16
FLOAT16_MAX = int(torch.finfo(torch.float16).max)  # 65,504


@dataclass(frozen=True)
class Backbone:
    """A network without its head: (B, 3, S, S) normalized floats → (B, feature_dim)."""

    name: str
    weights: str
    weights_sha256: str
    feature_dim: int
    network: nn.Module  # float32, on the CPU, in eval mode, frozen
    preprocessing: Preprocessing = IMAGENET
    image_size: int = 224  # what it was trained for, both sides
    notices: tuple[str, ...] = ()  # about where in a file its weights were
    details: tuple[str, ...] = ()  # notices that ask for nothing
    # The latest fast network, by (device, dtype, image size). It is kept so that the network that
    # was compared with float32 is the one that is then used.
    _fast: dict[tuple[torch.device, torch.dtype, int], nn.Module] = field(
        default_factory=dict, compare=False, repr=False
    )
    # Features (1, D) of the plain network that a thread computes, by its pixels: see `precision`.
    plain: dict[bytes, Future[Tensor]] = field(default_factory=dict, compare=False, repr=False)
    # The image sizes that are known to give one vector each.
    _sizes: set[int] = field(default_factory=set, compare=False, repr=False)

    def fast_network(self, device: torch.device, dtype: torch.dtype, image_size: int) -> nn.Module:
        """The network with fused convolutions, on `device` in `dtype`; see `fused_convolutions`.

        It is meant for images of this size, but `run` tells whether they are possible. Raises
        PrecisionError if the weights are beyond `dtype`.
        """
        key = (device, dtype, image_size)
        if key not in self._fast:
            self._fast.clear()  # frees the old network's memory before the new one needs it
            network = fold_batchnorm(self.network)
            if dtype is torch.float16:
                self._check_range(network)
            network = fuse_convolutions(network, device, dtype, typical_batch=_TYPICAL_BATCH)
            self._fast[key] = network
        return self._fast[key]

    def _check_range(self, folded: nn.Module) -> None:
        """Raise PrecisionError if float16 cannot hold a weight. Other precisions have the range of
        float32."""
        for name, tensor in folded.state_dict().items():
            if tensor.is_floating_point() and not is_within(tensor, FLOAT16_MAX):
                raise PrecisionError(
                    f"{self.name} with weights {self.weights}: {name}, with its BatchNorm, is "
                    f"beyond float16's {FLOAT16_MAX:,}; float32 and bfloat16 can hold it"
                )

    def check_image_size(self, image_size: int) -> None:
        """Raise EncoderError unless images of this size give one vector each.

        Computes shapes only, unless the network's code fails at that; and nothing if the network
        has run on such images.
        """
        if image_size in self._sizes:
            return
        shape = 2, 3, image_size, image_size
        try:
            features = run_on_meta(self.network, shape)
        except Exception:  # whatever the network's code raises
            try:
                with torch.inference_mode():
                    features = self.network(torch.zeros(shape))
            except Exception as error:
                raise EncoderError(
                    f"{self.name} cannot take {image_size}×{image_size} pixels ({reason_of(error)})"
                ) from None
        self._check_output(features, 2)
        self._sizes.add(image_size)

    def run(self, network: nn.Module, images: Tensor) -> Tensor:
        """The features (B, D) that `network`, a form of this backbone, computes.

        images: (B, 3, S, S), normalized, on the network's device. Raises EncoderError if images of
        this size do not give one vector each, PrecisionError if the network fails in low precision,
        and otherwise what the network raises.
        """
        size = int(images.shape[-1])
        try:
            features = network(images)
        except Exception as error:  # whatever the network's code raises
            if not is_out_of_memory(error):
                self.check_image_size(size)  # raises if that is the reason
                if images.dtype is not torch.float32:
                    raise PrecisionError(
                        f"{self.name} cannot run in {str(images.dtype).removeprefix('torch.')} "
                        f"({reason_of(error)}); use --precision float32"
                    ) from None
            raise
        checked = self._check_output(features, len(images))
        self._sizes.add(size)
        return checked

    def _check_output(self, features: object, count: int) -> Tensor:
        """The features (count, D). Raises EncoderError if they are something else."""
        if isinstance(features, Tensor) and features.shape == (count, self.feature_dim):
            return features
        found = (
            f"numbers of shape {tuple(features.shape[1:])}"
            if isinstance(features, Tensor) and len(features.shape) > 0
            else f"a {type(features).__name__}"
        )
        raise EncoderError(
            f"{self.name} gives {found} for a photo and not one vector of {self.feature_dim}; "
            "choose another backbone"
        )


def reason_of(error: BaseException) -> str:
    """What an error of a network's code says, in one line that is not long."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def is_within(tensor: Tensor, largest: float) -> bool:
    """Whether no number of a tensor is NaN or further from zero than `largest`."""
    if not tensor.numel():
        return True
    least, most = torch.aminmax(tensor)  # one pass; both are NaN if any number is
    return bool(least >= -largest) and bool(most <= largest)
