"""Loading a GPU's libraries while Python does something else."""

from __future__ import annotations

import contextlib
import threading

import torch

from train import private_torch

_CHANNELS = 64


def begin_warm_up(device: torch.device) -> None:
    """Let a thread compute a small convolution and a small product on a GPU.

    The first ones make cuDNN and cuBLAS load, for some tenths of a second in which Python's lock is
    free. Meanwhile the caller can build the network and read its weights. Does nothing on a CPU.
    """
    if device.type == "cuda":
        threading.Thread(target=_warm_up, args=(device,), daemon=True).start()


@torch.inference_mode()
def _warm_up(device: torch.device) -> None:
    # Whatever fails here fails again where it matters, and is reported there.
    with contextlib.suppress(RuntimeError):
        weight = torch.zeros(_CHANNELS, _CHANNELS, 1, 1, dtype=torch.float16, device=device)
        weight = weight.contiguous(memory_format=torch.channels_last)
        private_torch.cudnn_convolution(
            weight, weight, weight[:, 0, 0, 0], ([0, 0], [1, 1], [1, 1], 1)
        )
        features = torch.zeros(_CHANNELS, _CHANNELS, device=device)
        torch.mm(features, features)
