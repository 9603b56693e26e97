"""The frozen backbone: any torchvision classifier without its last linear layer.

The plain network in float32 is the reference. What runs is the same network with its convolutions
fused (`fused_convolutions`), channels last in memory, in the precision of the record; on a GPU as
one CUDA graph for each shape of batch.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cache.errors import CapError
from cache.record import EncoderRecord
from pipeline.encoder.cuda_graph import CapturedGraphs
from pipeline.encoder.fused_convolutions import (
    BATCHNORMS,
    fold_batchnorm,
    fuse_convolutions,
    has_batchnorm,
    meta_twin,
)
from pipeline.encoder.torchvision_models import classifiers
from pipeline.photos.preprocessing import IMAGENET_MEAN, IMAGENET_STD, PREPROCESSING
from train.allocator import keep_freed_memory
from train.device import has_fast_bfloat16, is_out_of_memory

RANDOM = "random"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Fast features that point elsewhere than float32's by more than this are not the same features.
MIN_COSINE = 0.999  # of every photo
MEAN_COSINE = 0.9999  # of all together

# For which the weights are laid out in memory; any other works.
_TYPICAL_BATCH = 16
_RANDOM_SEED = 0
_CALIBRATION_IMAGES = 8


class EncoderError(CapError):
    """A backbone, its weights or its device cannot be used. One line."""


@dataclass(frozen=True)
class Backbone:
    """A headless network: (B, 3, S, S) normalized floats → (B, feature_dim)."""

    name: str
    weights: str
    weights_sha256: str
    feature_dim: int
    network: nn.Module  # float32, on the CPU, in eval mode, frozen
    # The network last made ready to run, and for what: the one a precision was judged by is the
    # one that is then used.
    _fast: dict[tuple[torch.device, torch.dtype, int], nn.Module] = field(
        default_factory=dict, compare=False, repr=False
    )

    def fast_network(self, device: torch.device, dtype: torch.dtype, image_size: int) -> nn.Module:
        """The network with fused convolutions, on `device` in `dtype`; see `fused_convolutions`.

        Raises EncoderError unless this image size gives one vector a photo.
        """
        key = (device, dtype, image_size)
        if key not in self._fast:
            if device.type != "cpu":
                _check_shapes(self, image_size)
            self._fast.clear()  # its memory first
            network = fuse_convolutions(
                fold_batchnorm(self.network), device, dtype, typical_batch=_TYPICAL_BATCH
            )
            if device.type == "cpu":  # a photo takes less time than the shapes alone would
                photo = torch.zeros(1, 3, image_size, image_size, dtype=dtype)
                _check_output(self, network, photo.to(memory_format=torch.channels_last))
            self._fast[key] = network
        return self._fast[key]


def load_backbone(name: str, weights: str) -> Backbone:
    """Build a torchvision classifier, drop its head, load and freeze its weights.

    weights: a torchvision name (`IMAGENET1K_V1`, downloaded once), a file of a state dict (`.pth`,
    `.safetensors`; the head may be missing or of another size), or `random` (seeded, calibrated).
    Raises EncoderError.
    """
    if weights == RANDOM:
        network, feature_dim, sha256 = _random_network(name)
    else:
        network, feature_dim = _headless(name, device="meta")
        state, source = _read_weights(name, weights)
        _load_strictly(network, state, f"{source}: not weights of {name}")
        sha256 = _sha256(network.state_dict())
    network.eval().requires_grad_(False)
    return Backbone(name, weights, sha256, feature_dim, network)


def _headless(name: str, device: str) -> tuple[nn.Module, int]:
    """A torchvision classifier with its last linear layer replaced by the identity."""
    try:
        with torch.device(device), _NothingDrawn(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some constructors announce changes of their defaults
            network: nn.Module = classifiers().get_model(name, weights=None)
    except NotImplementedError:  # a RegNet computes its widths by tensors
        if device == "cpu":
            raise
        return _headless(name, "cpu")
    except ValueError:
        raise EncoderError(
            f"no backbone {name!r} in torchvision; for example resnet152, resnet50, mobilenet_v2"
        ) from None
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise EncoderError(f"{name} does not end in a linear layer; choose another backbone")
    parent, _, child = linear[-1].rpartition(".")
    head = network.get_submodule(linear[-1])
    assert isinstance(head, nn.Linear)
    setattr(network.get_submodule(parent), child, nn.Identity())
    return network, head.in_features


# What torch hands to a mode. The initializers of torch.nn.init among them draw unseen by it.
_DRAWING = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_)


class _NothingDrawn(TorchFunctionMode):
    """On the meta device weights are not drawn: torch would load its compiler to draw nothing."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._skips = device == "meta"

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._skips and func in _DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _check_shapes(backbone: Backbone, image_size: int) -> None:
    """`_check_output` before anything is computed, or on its device."""
    pixels = torch.empty(2, 3, image_size, image_size, device="meta")
    _check_output(backbone, meta_twin(backbone.network), pixels)


@torch.inference_mode()
def _check_output(backbone: Backbone, network: nn.Module, pixels: Tensor) -> None:
    """Raise EncoderError unless such pixels (B, 3, S, S) give one vector a photo."""
    image_size = pixels.shape[-1]
    try:
        shape = tuple(network(pixels).shape)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise EncoderError(
            f"{backbone.name} cannot take {image_size}×{image_size} pixels ({reason})"
        ) from None
    except AttributeError:
        shape = ()
    if shape != (len(pixels), backbone.feature_dim):
        raise EncoderError(
            f"{backbone.name} gives no pooled vector before its last layer; choose another backbone"
        )


def _read_weights(name: str, weights: str) -> tuple[dict[str, Tensor], str]:
    """(state dict, where it came from). Raises EncoderError."""
    path = Path(weights).expanduser()
    published = classifiers().get_model_weights(name)
    if weights in published.__members__:
        try:
            state = published[weights].get_state_dict(progress=False, check_hash=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: the download's hash is wrong
            raise EncoderError(
                f"cannot download {name} {weights} ({error}); give a file with --weights PATH"
            ) from None
        return dict(state), f"{name} {weights}"
    if not path.exists():
        names = ", ".join(published.__members__) or "none"
        raise EncoderError(
            f"{weights}: no such weights file, and not a published name of {name} ({names})"
        )
    return _read_weights_file(path), str(path)


def _read_weights_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and safetensors raise a dozen kinds on a foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnpicklingError):  # advice on how to run whatever is in it
            reason = "no state dict, or one with more than tensors in it"
        raise EncoderError(f"{path}: not a weights file ({reason[:120]})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise EncoderError(f"{path}: holds no state dict")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _load_strictly(network: nn.Module, state: Mapping[str, Tensor], complaint: str) -> None:
    """Load every tensor the headless network has, as float32; ignore what it has not (the head)."""
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
        raise EncoderError(f"{complaint} (it has {len(state)} tensors, {len(own)} are known)")
    network.load_state_dict(loaded, assign=True)


def _random_network(name: str) -> tuple[nn.Module, int, str]:
    """(network, feature_dim, hash): seeded weights, BatchNorm statistics measured on seeded images.

    With untouched statistics a deep ResNet's activations grow past float16 (5e7 at depth 152). The
    measured ones may differ in the last bit between machines, so the hash is that of the seeded
    weights alone. Residual branches are scaled as training leaves them; see `_scale_branches`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)
        network, feature_dim = _headless(name, device="cpu")
        _scale_branches(network)
        sha256 = _sha256(network.state_dict())
        # Coarse noise, enlarged: like photos, it has structure at every scale.
        coarse = torch.randn(_CALIBRATION_IMAGES, 3, 14, 14)
        images = nn.functional.interpolate(coarse, (224, 224), mode="bicubic")
        for module in network.modules():
            if isinstance(module, BATCHNORMS):
                module.momentum = None  # the plain average over passes: here, of one
        if has_batchnorm(network):
            with torch.no_grad():
                network.train()(images)
    return network, feature_dim, sha256


def _scale_branches(network: nn.Module) -> None:
    """Let each of L residual branches of a ResNet add 1/L of the variance of the blocks' input.

    De and Smith (2020) find that trained residual networks have branches about 1/√L as large as
    their shortcuts. With branches of full size a ResNet-152 is chaotic: rounding its input to
    bfloat16 alone turns some photos' features by a tenth, which no trained network does.
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
    """Of names, shapes and float32 bytes in sorted order; independent of the file format."""
    digest = hashlib.sha256()
    for key in sorted(state):
        if not key.endswith("num_batches_tracked"):
            tensor = state[key].detach().contiguous()
            digest.update(f"{key} {tuple(tensor.shape)};".encode())
            digest.update(tensor.numpy().data)
    return digest.hexdigest()


def encoder_record(
    backbone: Backbone, image_size: int, views: tuple[str, ...], precision: str
) -> EncoderRecord:
    """How features of this backbone are made. Raises EncoderError if it cannot take such images."""
    _check_shapes(backbone, image_size)
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
        preprocessing=PREPROCESSING,
        precision=precision,
    )


class Encoder:
    """A backbone ready to run on one device in one precision. Make one with `Encoder.load`."""

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
        self.notices: list[str] = []  # what the user should know of; whoever shows them clears them
        dtype = DTYPES[precision]
        if device.type == "cpu":
            keep_freed_memory()  # each layer's results are as large at the next batch
        self._network = backbone.fast_network(device, dtype, image_size)
        self._normalize = normalizer(device, dtype)
        self._graphs = CapturedGraphs(self._forward, device) if device.type == "cuda" else None
        self._told_failure = False
        self._most_photos = sys.maxsize  # at once; less where the device's memory is too small

    @classmethod
    def load(
        cls, record: EncoderRecord, *, device: torch.device, weights: str | None = None
    ) -> Encoder:
        """The encoder behind a cache or a model, from its record.

        weights: where the weights lie now, if not where the record says. Raises EncoderError if
        they are not the recorded ones or the pixels are made differently now.
        """
        if record.preprocessing != PREPROCESSING:
            raise EncoderError(
                f"features were made with preprocessing {record.preprocessing!r}, "
                f"this version has {PREPROCESSING!r}; extract again"
            )
        backbone = load_backbone(record.backbone, weights or record.weights)
        if backbone.weights_sha256 != record.weights_sha256:
            raise EncoderError(
                f"{weights or record.weights}: weights {backbone.weights_sha256[:12]}…, the model "
                f"was trained on features of weights {record.weights_sha256[:12]}…"
            )
        precision = record.precision
        if precision == "float16" and device.type == "cpu":
            precision = "float32"  # CPUs lack float16 convolutions; float32 is its closest relative
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
        on a GPU the work is only queued when this returns. Where the device's memory is too small
        the batch is halved until it fits, which `notices` then says. Raises EncoderError where not
        even one photo fits.
        """
        while True:
            try:
                parts = [self._encode(part) for part in pixels.split(self._most_photos)]
                return torch.cat(parts) if len(parts) > 1 else parts[0]
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            photos = min(len(pixels), self._most_photos)
            if photos == 1:
                raise EncoderError(
                    f"{self.device}: out of memory with a single photo of "
                    f"{self.record.image_size}×{self.record.image_size} pixels"
                )
            self._most_photos = photos // 2
            if self._graphs is not None:
                self._graphs.clear()
                torch.cuda.empty_cache()
            self.notices.append(
                f"{self.device}: out of memory with {photos} photos at once; "
                f"going on with {self._most_photos}"
            )

    def queue(self, pixels: Tensor) -> QueuedFeatures:
        """As `encode`, on the way to the CPU. Pinned pixels must stay as they are until then."""
        return QueuedFeatures(self.encode(pixels))

    def _encode(self, pixels: Tensor) -> Tensor:
        with _reproducible_kernels(self.device):
            if self._graphs is None:
                return self._forward(pixels)
            features = self._graphs(pixels)
            if self._graphs.failure and not self._told_failure:
                self._told_failure = True
                self.notices.append(
                    f"{self.device}: no CUDA graph ({self._graphs.failure}); going on without"
                )
            return features

    def _forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self._network(self._normalize(pixels))
        return features.to(torch.float16)


class QueuedFeatures:
    """Features that a GPU may still be computing, while the next batch is queued behind them."""

    def __init__(self, features: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        if features.is_cuda:
            # Waiting for the stream instead would be waiting for the batches queued later, too.
            on_cpu = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
            on_cpu.copy_(features, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(features.device))
            features = on_cpu
        self._features = features

    def wait(self) -> NDArray[np.float16]:
        """(B, D). When this returns, the pixels they come from are no longer read."""
        if self._ready is not None:
            self._ready.synchronize()
        features: NDArray[np.float16] = self._features.numpy()
        return features


def encode_plain(backbone: Backbone, pixels: Tensor, device: torch.device) -> Tensor:
    """The reference: the network as torchvision builds it, float32, eager. (B, D) float32."""
    network = backbone.network
    if device.type != "cpu":
        network = copy.deepcopy(network).to(device)
    with torch.inference_mode(), _reproducible_kernels(device):
        features: Tensor = network(normalizer(device, torch.float32)(pixels.to(device)))
    return features


def fast_precisions(device: torch.device) -> tuple[str, ...]:
    """Precisions worth trying on this device, the fastest acceptable first; float32 is last."""
    if device.type == "cuda":
        # float16 runs at bfloat16's speed and keeps three more bits of each number.
        return ("float16", "bfloat16", "float32")
    return ("bfloat16", "float32") if has_fast_bfloat16() else ("float32",)


def choose_precision(
    backbone: Backbone,
    pixels: Tensor,
    *,
    device: torch.device,
    candidates: tuple[str, ...] | None = None,
) -> tuple[str, list[str]]:
    """The fastest precision whose features agree with plain float32 on these photos.

    pixels: (B, 3, S, S) uint8, B ≥ 1 real photos. Returns the precision and a notice for each one
    that was turned down: a photo's cosine to float32 below MIN_COSINE, or their mean below
    MEAN_COSINE.
    """
    candidates = candidates or fast_precisions(device)
    notices: list[str] = []
    if candidates[0] == "float32":
        return "float32", notices
    reference = encode_plain(backbone, pixels, device)
    for precision in candidates:
        if precision == "float32":
            break
        encoder = Encoder(
            backbone, device=device, precision=precision, image_size=int(pixels.shape[-1])
        )
        fast = encoder.encode(pixels).float()
        cosines = nn.functional.cosine_similarity(fast, reference).nan_to_num(-1)
        worst, mean = float(cosines.min()), float(cosines.mean())
        if worst >= MIN_COSINE and mean >= MEAN_COSINE:
            return precision, notices
        notices.append(
            f"{backbone.name} in {precision} strays from float32 (cosine {mean:.5f}, at worst "
            f"{worst:.4f}, over {len(pixels)} photos; {MEAN_COSINE} and {MIN_COSINE} wanted); "
            "trying the next precision"
        )
    return "float32", notices


def normalizer(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """(B, 3, S, S) uint8 → normalized, channels last, in one multiply and one add."""
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    scale = 1 / (255 * std)
    shift = -torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1) / std

    def normalize(pixels: Tensor) -> Tensor:
        images = pixels.contiguous(memory_format=torch.channels_last).float()
        return images.mul_(scale).add_(shift).to(dtype)

    return normalize


@contextlib.contextmanager
def _reproducible_kernels(device: torch.device) -> Iterator[None]:
    """On a GPU, made current: no autotuning, which may choose otherwise next time, and no TF32."""
    if device.type == "cpu":
        yield
        return
    flags = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    with torch.cuda.device(device), flags:  # a graph is replayed on the current device's stream
        yield
