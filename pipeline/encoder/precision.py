"""Choosing the precision of the backbone: the fastest whose features agree with float32."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pipeline.encoder.backbone import Backbone
from pipeline.encoder.encoder import Encoder, normalizer, reproducible_kernels
from train.device import has_fast_bfloat16

# The least cosine between fast and float32 features for which both count as the same features.
MIN_COSINE = 0.999  # of each photo
MEAN_COSINE = 0.9999  # on average


def encode_plain(backbone: Backbone, pixels: Tensor, device: torch.device) -> Tensor:
    """The reference: features of the network as torchvision builds it, float32, eager.

    pixels: (B, 3, S, S) uint8. Returns (B, D) float32 on `device`.
    """
    network = backbone.network
    if device.type != "cpu":
        network = copy.deepcopy(network).to(device)
    with torch.inference_mode(), reproducible_kernels(device):
        features: Tensor = network(normalizer(device, torch.float32)(pixels.to(device)))
    return features


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
    EncoderError if the backbone cannot take such images.
    """
    candidates = candidates or fast_precisions(device)
    notices: list[str] = []
    if candidates[0] == "float32":
        return "float32", notices
    backbone.check_image_size(int(pixels.shape[-1]))  # before the plain network, which cannot tell
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
            f"{backbone.name} in {precision} differs too much from float32 (cosine over "
            f"{len(pixels)} photos: mean {mean:.5f}, lowest {worst:.4f}; needed: {MEAN_COSINE} "
            f"and {MIN_COSINE}); trying the next precision"
        )
    return "float32", notices
