"""The shape of a network's output, without its numbers.

PyTorch computes shapes on its meta device. For the commonest operations this imports sympy, Triton
and parts of the compiler, in two seconds. Their shapes are simple and are computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pipeline.encoder.fusion.batchnorm import copy_with
from train.torch_import import import_meta_kernels


@torch.inference_mode()
def run_on_meta(network: nn.Module, pixels_shape: Sequence[int]) -> Any:
    """What the network returns for pixels of this shape, on the meta device.

    network: in eval mode, on any device; its weights are not copied. Raises what the network raises
    for such pixels.
    """
    twin, pixels = meta_twin(network), torch.empty(*pixels_shape, device="meta")
    try:
        with _SimpleShapes():
            return twin(pixels)
    except NotImplementedError:  # an operation without a kernel for the meta device, so far
        import_meta_kernels()
        with _SimpleShapes():
            return twin(pixels)


def meta_twin(network: nn.Module) -> nn.Module:
    """A copy on the meta device: shapes without numbers. The weights are not copied."""
    return copy_with(network, lambda tensor: tensor.to("meta"))


class _SimpleShapes(TorchFunctionMode):
    """Answers the operations of the tables below with an empty tensor of the right shape."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ELEMENTWISE:
            return torch.empty_like(args[0])
        rule = _RULES.get(func)
        return func(*args, **kwargs) if rule is None else rule(*args, **kwargs)


# Functions that return a tensor of their first argument's shape.
_ELEMENTWISE = (functional.batch_norm, functional.layer_norm, functional.relu)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x: (B, C, H, W). weight: (D, C / groups, h, w). Returns (B, D, H', W')."""
    if isinstance(padding, str):
        return functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if x.dim() != 4 or x.shape[1] != weight.shape[1] * groups:
        raise RuntimeError(
            f"a convolution of {weight.shape[1] * groups} channels got {tuple(x.shape)}"
        )
    sizes = []
    for size, kernel, step, pad, spread in zip(
        x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
    ):
        room = size + 2 * pad - spread * (kernel - 1) - 1
        if room < 0:
            raise RuntimeError(f"{kernel}×{kernel} is larger than the {size + 2 * pad} pixels left")
        sizes.append(room // step + 1)
    return x.new_empty((x.shape[0], weight.shape[0], *sizes))


def _average_pool(x: Tensor, output_size: int | Sequence[int | None]) -> Tensor:
    """x: (B, C, H, W). Returns (B, C, h, w); None stands for the size that there is."""
    sizes = (output_size,) * 2 if isinstance(output_size, int) else output_size
    kept = [old if new is None else new for old, new in zip(x.shape[-2:], sizes, strict=True)]
    return x.new_empty((*x.shape[:-2], *kept))


def _attention(query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """query: (T, B, E). Returns the attended values (T, B, E), and the weights if asked for."""
    if kwargs.get("need_weights", True):
        return functional.multi_head_attention_forward(query, *args, **kwargs)
    return torch.empty_like(query), None


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv2d: _convolution,
    functional.multi_head_attention_forward: _attention,
    functional.adaptive_avg_pool2d: _average_pool,
}
