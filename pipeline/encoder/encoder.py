"""The encoder: a backbone that runs on one device, from pixels to features.

It runs the fast network of the backbone in the precision of its record; on a GPU as one CUDA graph
for each shape of batch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from cache.record import EncoderRecord
from pipeline.encoder.backbone import Backbone
from pipeline.encoder.cuda_graph import CapturedGraphs
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.recorded_weights import recorded_backbone
from pipeline.photos.preprocessing import Preprocessing
from train.allocator import keep_freed_memory
from train.device import is_out_of_memory

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def encoder_record(
    backbone: Backbone, image_size: int, views: tuple[str, ...], precision: str
) -> EncoderRecord:
    """How features of this backbone are made. Raises EncoderError if it cannot take such images."""
    backbone.check_image_size(image_size)
    return _record(backbone, image_size, views, precision)


def _record(
    backbone: Backbone, image_size: int, views: tuple[str, ...], precision: str
) -> EncoderRecord:
    return EncoderRecord(
        backbone=backbone.name,
        weights=backbone.weights,
        weights_sha256=backbone.weights_sha256,
        feature_dim=backbone.feature_dim,
        image_size=image_size,
        views=views,
        preprocessing=str(backbone.preprocessing),
        precision=precision,
    )


def load_recorded(
    record: EncoderRecord, weights: str | None = None, near: Path | None = None
) -> Backbone:
    """The backbone behind a cache or a model, from its record.

    weights, near: as for `recorded_backbone`. Raises EncoderError if the recorded weights are not
    found, or if this version does not know the recorded preprocessing. Its preprocessing is the
    recorded one, whatever is usual for the network by now.
    """
    preprocessing = Preprocessing.parse(record.preprocessing)
    if preprocessing is None:
        raise EncoderError(
            f"features were made with preprocessing {record.preprocessing!r}, "
            "which this version does not know; extract again"
        )
    return replace(recorded_backbone(record, weights, near), preprocessing=preprocessing)


class Encoder:
    """A backbone that is ready to run on one device in one precision. See also `Encoder.load`."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        device: torch.device,
        precision: str,
        image_size: int = 224,
        views: tuple[str, ...] = ("full",),
    ) -> None:
        self.device = device
        self.record = _record(backbone, image_size, views, precision)
        self.notices: list[str] = []  # messages for the user; whoever shows them clears the list
        dtype = DTYPES[precision]
        if device.type == "cpu":
            keep_freed_memory()  # the next batch needs blocks of the same sizes
        self._network = backbone.fast_network(device, dtype, image_size)
        if not isinstance(self._network, fx.GraphModule) and _has_convolutions(self._network):
            self.notices.append(
                f"{backbone.name}: its code cannot be traced, so its layers are not fused"
            )
        # Until it has run once. Then the plain network's memory is no longer needed.
        self._backbone: Backbone | None = backbone
        self.preprocessing = backbone.preprocessing
        self._normalize = normalizer(device, dtype, backbone.preprocessing)
        self._graphs = CapturedGraphs(self._forward, device) if device.type == "cuda" else None
        self._failure_told = False
        self._max_photos = sys.maxsize  # at once; reduced when the device runs out of memory

    @classmethod
    def load(
        cls,
        record: EncoderRecord,
        *,
        device: torch.device,
        weights: str | None = None,
        near: Path | None = None,
    ) -> Encoder:
        """The encoder behind a cache or a model, from its record.

        weights, near: as for `load_recorded`, which raises EncoderError. A CPU computes in float32
        what the record says is in float16: CPUs lack float16 convolutions, and float32's features
        are the closest.
        """
        backbone = load_recorded(record, weights, near)
        precision = record.precision
        if precision == "float16" and device.type == "cpu":
            precision = "float32"
        return cls(
            backbone,
            device=device,
            precision=precision,
            image_size=record.image_size,
            views=record.views,
        )

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pooled backbone features, without gradients.

        pixels: (B, 3, S, S) uint8 RGB, any device. Returns (B, D) float16 on the encoder's device;
        on a GPU the work is only queued when this returns. If the device runs out of memory, the
        batch is halved until it fits, and a notice is added to `notices`. Raises EncoderError if
        not even one photo fits, or if the backbone does not make one vector of each such image.
        """
        while True:
            try:
                parts = [self._encode(part) for part in pixels.split(self._max_photos)]
                return torch.cat(parts) if len(parts) > 1 else parts[0]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            photos = min(len(pixels), self._max_photos)
            if photos == 1:
                raise EncoderError(
                    f"{self.device}: out of memory with a single photo of "
                    f"{self.record.image_size}×{self.record.image_size} pixels"
                )
            self._max_photos = photos // 2
            if self._graphs is not None:
                self._graphs.clear()
                torch.cuda.empty_cache()
            self.notices.append(
                f"{self.device}: out of memory with {photos} photos at once; "
                f"continuing with {self._max_photos}"
            )

    @torch.inference_mode()
    def warm_up(self, rows: int, batches: int) -> None:
        """On a GPU, encode black photos until batches of this many rows are computed as fast as
        ever: libraries choose their kernels, and from two batches on a graph is captured.

        It takes a second or two. Meanwhile the first photos can be read.
        """
        if self._graphs is None:
            return
        size, count = self.record.image_size, rows * len(self.record.views)
        black = torch.zeros(count, size, size, 3, dtype=torch.uint8, device=self.device)
        pixels = black.permute(0, 3, 1, 2)
        if batches > 1:
            for _ in range(2):
                self.encode(pixels)
        else:
            with reproducible_kernels(self.device), contextlib.suppress(torch.OutOfMemoryError):
                self._forward(pixels)

    def queue(self, pixels: Tensor) -> QueuedFeatures:
        """Like `encode`, but also queues the copy of the features to the CPU.

        Pinned pixels must not change before `QueuedFeatures.wait` has returned.
        """
        return QueuedFeatures(self.encode(pixels))

    def _encode(self, pixels: Tensor) -> Tensor:
        with reproducible_kernels(self.device):
            if self._graphs is None:
                return self._forward(pixels)
            features = self._graphs(pixels)
            if self._graphs.failure and not self._failure_told:
                self._failure_told = True
                self.notices.append(
                    f"{self.device}: cannot capture a CUDA graph ({self._graphs.failure}); "
                    "continuing without one"
                )
            return features

    def _forward(self, pixels: Tensor) -> Tensor:
        images = self._normalize(pixels)
        if self._backbone is None:
            features: Tensor = self._network(images)
        else:
            features = self._backbone.run(self._network, images)
            self._backbone = None
        return features.to(torch.float16)


def _has_convolutions(network: nn.Module) -> bool:
    """Whether fusing would matter: a transformer's only convolution cuts the photo in patches."""
    return sum(isinstance(module, nn.Conv2d) for module in network.modules()) > 1


class QueuedFeatures:
    """Features that a GPU may still be computing, while the next batch is queued behind them."""

    def __init__(self, features: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if features.is_cuda:
            # An event, because waiting for the stream would also wait for batches queued later.
            on_cpu = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            on_cpu.copy_(features, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(features.device))
            features = on_cpu
        self._features = features

    def wait(self) -> NDArray[np.float16]:
        """The features (B, D). Once this returns, their pixels are not read any more."""
        if self._ready is not None:
            self._ready.synchronize()
        features: NDArray[np.float16] = self._features.numpy()
        return features


def normalizer(
    device: torch.device, dtype: torch.dtype, preprocessing: Preprocessing
) -> Callable[[Tensor], Tensor]:
    """(B, 3, S, S) uint8 → normalized, channels last, in one multiplication and one addition."""
    std = torch.tensor(preprocessing.std, device=device).view(3, 1, 1)
    scale = 1 / (255 * std)
    shift = -torch.tensor(preprocessing.mean, device=device).view(3, 1, 1) / std

    def normalize(pixels: Tensor) -> Tensor:
        images = pixels.contiguous(memory_format=torch.channels_last).float()
        return images.mul_(scale).add_(shift).to(dtype)

    return normalize


@contextlib.contextmanager
def reproducible_kernels(device: torch.device) -> Iterator[None]:
    """Make a GPU the current device, with cuDNN's autotuning (which may choose other kernels next
    time) and TF32 switched off. Changes nothing on a CPU."""
    if device.type == "cpu":
        yield
        return
    flags = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    with torch.cuda.device(device), flags:  # a graph is replayed on the current device's stream
        yield
