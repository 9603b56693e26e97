"""The identity of a network's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes and float32 bytes, sorted by name. It is independent of the format of
    the file that the tensors come from."""
    digest = hashlib.sha256()
    for key in sorted(state):
        if not key.endswith("num_batches_tracked"):
            tensor = state[key].detach().contiguous()
            digest.update(f"{key} {tuple(tensor.shape)};".encode())
            digest.update(tensor.numpy().data)
    return digest.hexdigest()
