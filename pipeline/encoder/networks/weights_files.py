"""Files with weights: what is read, and nothing in them is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from pipeline.encoder.errors import EncoderError


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
