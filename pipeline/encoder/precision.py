"""The precision of the backbone: the fastest whose features agree with the plain network's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from pipeline.encoder.backbone import FLOAT16_MAX, Backbone
from pipeline.encoder.encoder import Encoder, normalizer, reproducible_kernels
from pipeline.encoder.errors import EncoderError, PrecisionError
from pipeline.encoder.fusion.batchnorm import TRACING, copy_with
from train.device import has_fast_bfloat16

# The least cosine between fast and float32 features for which both count as the same features.
MIN_COSINE = 0.999  # of each photo
MEAN_COSINE = 0.9999  # on average
# Below this, features are wrong and not just rounded, in a precision that the user has chosen.
_WRONG_COSINE = {"float32": MIN_COSINE, "bfloat16": 0.9, "float16": 0.9}
_CPU = torch.device("cpu")


def encode_plain(backbone: Backbone, pixels: Tensor, device: torch.device) -> Tensor:
    """The reference: features of the network as torchvision builds it, float32, eager.

    pixels: (B, 3, S, S) uint8. Returns (B, D) float32 on `device`. Raises EncoderError if the
    backbone cannot take such images.
    """
    network = backbone.network
    if device.type != "cpu":
        network = copy_with(network, lambda tensor: tensor.to(device))
    with torch.inference_mode(), reproducible_kernels(device):
        return backbone.run(
            network, normalizer(device, torch.float32, backbone.preprocessing)(pixels.to(device))
        )


def check_features(backbone: Backbone, pixels: Tensor, features: Tensor, precision: str) -> None:
    """Compare the features of one picture with the plain network's. Raises EncoderError if they are
    not the same, not finite, or too large for a cache.

    pixels: (1, 3, S, S) uint8. features: (D,) float16 of the fast network, on the CPU. NaN that
    arose on the way may not be visible in them, because a fused ReLU makes 0 of it. PyTorch's own
    ReLU keeps it. If all features of both networks are zero, they are the same. The plain network
    runs on the CPU, because a GPU's memory may be full; `choose_precision` has begun with that.
    """
    plain = _plain_on_cpu(backbone, pixels)[0]
    features = features.float()
    _check_plain(backbone, plain)
    if torch.equal(features, plain):
        return
    cosine = float(nn.functional.cosine_similarity(features, plain, dim=0).nan_to_num(-1))
    if cosine < _WRONG_COSINE[precision]:
        advice = "" if precision == "float32" else "; use --precision float32 and another --out"
        raise EncoderError(
            f"{backbone.name} in {precision} gives wrong features (cosine {cosine:.2f} to those of "
            f"the plain network in float32){advice}"
        )


def _begin_plain_on_cpu(backbone: Backbone, pixels: Tensor) -> None:
    """Let a thread compute what `check_features` will ask for: a GPU is made ready meanwhile."""
    executor = ThreadPoolExecutor(1)
    backbone.plain[pixels.numpy().tobytes()] = executor.submit(_encode_on_cpu, backbone, pixels)
    executor.shutdown(wait=False)


def _plain_on_cpu(backbone: Backbone, pixels: Tensor) -> Tensor:
    begun = backbone.plain.pop(pixels.numpy().tobytes(), None)
    return _encode_on_cpu(backbone, pixels) if begun is None else begun.result()


def _encode_on_cpu(backbone: Backbone, pixels: Tensor) -> Tensor:
    """`encode_plain` on the CPU, perhaps in a thread of its own."""
    with TRACING:
        return encode_plain(backbone, pixels, _CPU)


def _check_plain(backbone: Backbone, features: Tensor) -> None:
    """Raise EncoderError if the plain network's own features are not finite, or if a cache, which
    stores float16, cannot hold them."""
    if not features.isfinite().all():
        raise EncoderError(
            f"{backbone.name} with weights {backbone.weights} gives features that are not finite "
            "even in float32, as after a training that diverged; use other weights"
        )
    largest = float(features.abs().max())
    if largest > FLOAT16_MAX:
        raise EncoderError(
            f"{backbone.name} with weights {backbone.weights} gives features up to {largest:.1e}; "
            f"a cache stores float16, at most {FLOAT16_MAX:,}; use other weights"
        )


def check_device(precision: str, device: torch.device) -> None:
    """Raise PrecisionError if features of this precision are not to be made on this device.

    CPUs lack float16 convolutions. `Encoder.load` computes such features in float32 there, to
    caption photos; but a cache says of all its rows how they were made.
    """
    if precision == "float16" and device.type == "cpu":
        raise PrecisionError(
            f"{device}: a CPU has no float16 convolutions; go on with a GPU, or use --precision "
            "float32 and another --out"
        )


def fast_precisions(device: torch.device) -> tuple[str, ...]:
    """Precisions worth trying on this device, the preferred one first. The last is float32."""
    if device.type == "cuda":
        # float16 is as fast as bfloat16 and has three more bits of precision.
        return ("float16", "bfloat16", "float32")
    return ("bfloat16", "float32") if has_fast_bfloat16() else ("float32",)


def choose_precision(
    backbone: Backbone,
    pixels: Tensor,
    *,
    device: torch.device,
    candidates: tuple[str, ...] | None = None,
) -> tuple[str, list[str]]:
    """The first candidate whose features agree with plain float32 on these photos.

    pixels: (B, 3, S, S) uint8, B ≥ 1 real photos. candidates: None for `fast_precisions`. Returns
    the precision, and a notice for each candidate that was rejected because the cosine of some
    photo to float32 is below MIN_COSINE or the mean cosine is below MEAN_COSINE. Raises
    EncoderError if the backbone cannot take such images, or if the features in float32 are not
    finite, or too large for a cache.
    """
    candidates = candidates or fast_precisions(device)
    notices: list[str] = []
    if candidates[0] == "float32":
        return "float32", notices
    reference = encode_plain(backbone, pixels, device)
    _check_plain(backbone, reference)
    for precision in candidates:
        if precision == "float32":
            break
        try:
            encoder = Encoder(
                backbone, device=device, precision=precision, image_size=int(pixels.shape[-1])
            )
            if device.type != "cpu" and not backbone.plain:  # not before, because of TRACING
                _begin_plain_on_cpu(backbone, pixels[:1].clone())
            fast = encoder.encode(pixels).float()
        except PrecisionError as error:
            notices.append(str(error))
            continue
        cosines = nn.functional.cosine_similarity(fast, reference).nan_to_num(-1)
        worst, mean = float(cosines.min()), float(cosines.mean())
        if worst >= MIN_COSINE and mean >= MEAN_COSINE:
            return precision, notices
        notices.append(
            f"{backbone.name} in {precision} differs too much from float32 (cosine over "
            f"{len(pixels)} photos: mean {mean:.5f}, lowest {worst:.4f}; needed: {MEAN_COSINE} "
            f"and {MIN_COSINE}); trying the next precision"
        )
    return "float32", notices
