"""Which objective, parameter layout and precision suit a device."""

from __future__ import annotations

import torch

from train.device import has_fast_bfloat16
from train.model.decoder import CaptionDecoder
from train.model.flat_parameters import FlatParameters
from train.step.cpu.objective import CpuObjective
from train.step.cuda.objective import CudaObjective

Objective = CpuObjective | CudaObjective


def product_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The dtype of matrix products: `float32` or `bfloat16` by name; with `auto`, bfloat16 where
    the device multiplies it faster than float32.
    """
    if precision != "auto":
        return torch.float32 if precision == "float32" else torch.bfloat16
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if has_fast_bfloat16() else torch.float32


def flat_parameters(decoder: CaptionDecoder) -> FlatParameters:
    """Move a decoder's parameters into the layout that the objective of its device needs."""
    device = next(decoder.parameters()).device
    return FlatParameters(decoder, transposed=device.type == "cpu")


def objective_for(
    decoder: CaptionDecoder,
    parameters: FlatParameters,
    *,
    dtype: torch.dtype,
    label_smoothing: float,
) -> Objective:
    """The objective for the device of `parameters`, which come from `flat_parameters`."""
    objective = CudaObjective if parameters.values.device.type == "cuda" else CpuObjective
    return objective(decoder, parameters, dtype=dtype, label_smoothing=label_smoothing)
