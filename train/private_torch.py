"""Every undocumented operation of PyTorch that the project uses, in one place.

Each function names its private operation, the PyTorch version that introduced it, what it gains,
and, after "Without it", the public way that is taken where the operation is missing (`_private`
then returns None). The tests run both ways and compare them. The oldest supported PyTorch is 2.11;
a newer one may rename or remove any of these operations.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Operation = Callable[..., Any]
# (padding, stride, dilation, groups) of a convolution.
Geometry = tuple[list[int], list[int], list[int], int]

# What oneDNN can apply to the result of a convolution, by its names.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "hardtanh": functional.relu6,  # only used from 0 to 6
    "hardswish": functional.hardswish,
    "swish": functional.silu,
    "sigmoid": torch.sigmoid,
}


@functools.cache
def _private(name: str) -> Operation | None:
    """The operation of this dotted name below `torch`, or None where this PyTorch lacks it."""
    found: Any = torch
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except (AttributeError, RuntimeError):  # torch.ops may raise either
            return None
    return found  # type: ignore[no-any-return]


# Matrix products and convolutions by oneDNN, on a CPU.


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """inputs (R, K) @ weight (K, N) + bias (N,), float32 on a CPU, by oneDNN.

    `mkldnn._linear_pointwise`, since 2.0. PyTorch's own product calls MKL, which runs at half the
    rate of oneDNN on AMD processors. Without it: PyTorch's own product.
    """
    operation = _private("ops.mkldnn._linear_pointwise")
    if operation is None:
        return inputs @ weight if bias is None else torch.addmm(bias, inputs, weight)
    return operation(inputs, weight.t(), bias, "none", [], "")  # type: ignore[no-any-return]


def lay_out_linear_weight(weight: Tensor, rows: int) -> Tensor:
    """The weight (N, K), float32, in the memory layout that oneDNN prefers for so many rows.

    Only `laid_out_linear` can use the result. `mkldnn._reorder_linear_weight`, since 2.1, saves
    this conversion at every call. Without it: the weight itself.
    """
    operation = _private("ops.mkldnn._reorder_linear_weight")
    if operation is None or _private("ops.mkldnn._linear_pointwise") is None:
        return weight
    return operation(weight.contiguous(), rows)  # type: ignore[no-any-return]


def laid_out_linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """inputs (R, K) @ weightᵀ + bias (N,), float32 on a CPU, by oneDNN.

    weight: from `lay_out_linear_weight`, for any number of rows. `mkldnn._linear_pointwise`, since
    2.0. Without it: PyTorch's own product.
    """
    operation = _private("ops.mkldnn._linear_pointwise")
    if operation is None or not weight.is_mkldnn:
        return functional.linear(inputs, weight, bias)
    return operation(inputs, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def has_bfloat16_convolutions() -> bool:
    """Whether oneDNN has bfloat16 convolutions for this CPU.

    `mkldnn._is_mkldnn_bf16_supported`, since 2.1. Without it: False, and callers use float32.
    """
    operation = _private("ops.mkldnn._is_mkldnn_bf16_supported")
    return operation is not None and bool(operation())


def lay_out_convolution_weight(
    weight: Tensor, geometry: Geometry, input_sizes: Sequence[int]
) -> Tensor:
    """The weight in the memory layout that oneDNN prefers for inputs of these sizes (B, C, H, W).

    Only `convolution` can use the result. `mkldnn._reorder_convolution_weight`, since 2.1, saves
    this conversion at every call. Without it: the weight itself.
    """
    operation = _private("ops.mkldnn._reorder_convolution_weight")
    if operation is None or _private("ops.mkldnn._convolution_pointwise") is None:
        return weight
    return operation(weight, *geometry, list(input_sizes))  # type: ignore[no-any-return]


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: str,
    parameters: Sequence[float],
    other: Tensor | None = None,
    *,
    in_place: bool = False,
) -> Tensor:
    """activation(conv(x) + other) in one oneDNN kernel, on a CPU.

    weight: from `lay_out_convolution_weight`. activation, parameters: "none", "relu", "hardtanh"
    with [0.0, 6.0], "hardswish", "swish" or "sigmoid"; with `other` only "none" and "relu".
    in_place: the result may overwrite `other`.

    `mkldnn._convolution_pointwise`, and for in_place `mkldnn._convolution_pointwise_`, since 2.0.
    Without the first: one operation after the other. Without the second: not in place.
    """
    operation: Any = _private("ops.mkldnn._convolution_pointwise")
    if operation is None:
        padding, stride, dilation, groups = geometry
        result = functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return _ACTIVATIONS[activation](result if other is None else result + other)
    if other is None:
        return operation(x, weight, bias, *geometry, activation, list(parameters), "")  # type: ignore[no-any-return]
    unary = activation if activation != "none" else None
    tail: tuple[Any, ...] = (*geometry, "add", 1.0, unary, [], "")
    overwriting: Any = _private("ops.mkldnn._convolution_pointwise_") if in_place else None
    if overwriting is not None:
        return overwriting.binary(other, x, weight, bias, *tail)  # type: ignore[no-any-return]
    return operation.binary(x, other, weight, bias, *tail)  # type: ignore[no-any-return]


# Convolutions by cuDNN, on a GPU.


def cudnn_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, other: Tensor | None = None
) -> Tensor:
    """relu(conv(x) + other) in one cuDNN kernel, in half precision, channels last.

    `cudnn_convolution_relu` and `cudnn_convolution_add_relu`, since 1.13 or earlier. Without them:
    one operation after the other.
    """
    padding, stride, dilation, groups = geometry
    alone, adding = _private("cudnn_convolution_relu"), _private("cudnn_convolution_add_relu")
    if alone is None or adding is None:
        result = functional.conv2d(x, weight, bias, stride, padding, dilation, groups)
        return torch.relu(result if other is None else result + other)
    if other is None:
        return alone(x, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]
    return adding(x, weight, other, 1.0, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]


# Photos.


def resize_into(photos: Tensor, out: Tensor, filter: str = "bilinear") -> None:
    """Resize `photos` (B, C, H, W) uint8 into `out` (B, C, h, w) uint8, with antialiasing.

    filter: `bilinear` or `bicubic`.

    `torch._C._nn._upsample_bilinear2d_aa` and `_upsample_bicubic2d_aa`, since 1.13 or earlier, for
    uint8 since 2.1. `interpolate` calls them, but has no `out`. Without them: `interpolate` and a
    copy.
    """
    size = list(out.shape[2:])
    operation = _private(f"_C._nn._upsample_{filter}2d_aa")
    if operation is None:
        out.copy_(functional.interpolate(photos, size, mode=filter, antialias=True))
    else:
        operation(photos, size, False, None, None, out=out)


# The operations of a training step.


def tanh_backward_(gradient: Tensor, tanh: Tensor) -> Tensor:
    """Multiply `gradient` by 1 - tanh², in place, and return it.

    `aten.tanh_backward.grad_input`, since 1.13 or earlier. Autograd calls it; it allocates nothing.
    Without it: the formula.
    """
    operation = _private("ops.aten.tanh_backward.grad_input")
    if operation is None:
        return gradient.mul_(1 - tanh * tanh)
    return operation(gradient, tanh, grad_input=gradient)  # type: ignore[no-any-return]


def sigmoid_backward_(gradient: Tensor, sigmoid: Tensor) -> Tensor:
    """Multiply `gradient` by sigmoid × (1 - sigmoid), in place, and return it.

    `aten.sigmoid_backward.grad_input`, since 1.13 or earlier. Autograd calls it; it allocates
    nothing. Without it: the formula.
    """
    operation = _private("ops.aten.sigmoid_backward.grad_input")
    if operation is None:
        return gradient.mul_(sigmoid * (1 - sigmoid))
    return operation(gradient, sigmoid, grad_input=gradient)  # type: ignore[no-any-return]


def batch_norm(
    x: Tensor,
    normalize: torch.nn.BatchNorm1d,
    measure: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(normalized x, mean, 1 / standard deviation) of x (B, E) float32, with a module's parameters.

    measure: normalize by the mean and variance of this batch, and update the running statistics
    with them. Otherwise normalize by the running statistics; the last two results are then
    meaningless. Pass both to `batch_norm_backward` in either case.

    `torch.native_batch_norm`, since 1.13 or earlier. The module calls it, but does not return the
    statistics. Without it: the module's public function, and the statistics by formula.
    """
    running = normalize.running_mean, normalize.running_var
    momentum = normalize.momentum or 0.0
    operation = _private("native_batch_norm")
    if operation is not None:
        arguments = (x, normalize.weight, normalize.bias, *running, measure, momentum)
        return operation(*arguments, normalize.eps)  # type: ignore[no-any-return]
    normalized = functional.batch_norm(
        x, *running, normalize.weight, normalize.bias, measure, momentum, normalize.eps
    )
    variance, mean = torch.var_mean(x, 0, correction=0)
    return normalized, mean, (variance + normalize.eps).rsqrt()


def batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    normalize: torch.nn.BatchNorm1d,
    mean: Tensor,
    inverse: Tensor,
    measured: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `batch_norm`'s first result with respect to (x, weight, bias).

    gradient: of that result. x, mean, inverse, measured: what went into `batch_norm`, and its last
    two results.

    `aten.native_batch_norm_backward`, since 1.13 or earlier. Autograd calls it. Without it: the
    formula of Ioffe and Szegedy (2015), section 3.
    """
    assert normalize.running_mean is not None
    assert normalize.running_var is not None
    operation = _private("ops.aten.native_batch_norm_backward")
    if operation is not None:
        running = normalize.running_mean, normalize.running_var
        arguments = (gradient, x, normalize.weight, *running, mean, inverse, measured)
        return operation(*arguments, normalize.eps, [True, True, True])  # type: ignore[no-any-return]
    if not measured:
        mean, inverse = normalize.running_mean, (normalize.running_var + normalize.eps).rsqrt()
    centred = (x - mean) * inverse
    d_weight, d_bias = (gradient * centred).sum(0), gradient.sum(0)
    scaled = gradient * (normalize.weight.detach() * inverse)
    if measured:
        scaled = scaled - scaled.mean(0) - centred * (scaled * centred).mean(0)
    return scaled, d_weight, d_bias


def lstm_cell(
    gates: Tensor,
    recurrent: Tensor,
    cells: Tensor,
    biases: tuple[Tensor, Tensor],
    *,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of an LSTM: (outputs (B, H), cells (B, H), activated gates (B, 4H): i, f, g, o).

    gates, recurrent: (B, 4H), the parts of the inputs and of the hidden state in the sums that
    enter the gates. cells: (B, H), of the step before. biases: (4H,) each. All are float32.

    fused: use `aten._thnn_fused_lstm_cell`, since 1.13 or earlier: one kernel, only for GPUs.
    Otherwise, or without it: the equations.
    """
    operation = _private("ops.aten._thnn_fused_lstm_cell") if fused else None
    if operation is not None:
        return operation(gates, recurrent, cells, *biases)  # type: ignore[no-any-return]
    i, f, g, o = (gates + recurrent + (biases[0] + biases[1])).chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cell = i * g + f * cells
    return o * cell.tanh(), cell, torch.cat([i, f, g, o], 1)


def lstm_cell_backward(
    d_outputs: Tensor,
    d_cells: Tensor | None,
    before: Tensor,
    cells: Tensor,
    activated: Tensor,
    *,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `lstm_cell`'s first two results, as (B, 4H) with respect to the sums that enter
    the gates and (B, H) with respect to `before`.

    d_outputs, d_cells: (B, H), the gradients of the outputs and the cells; None means zero. before,
    cells: (B, H), the cells before and after the step. activated: (B, 4H), the activated gates.

    fused: use `aten._thnn_fused_lstm_cell_backward_impl`, since 1.13 or earlier: one kernel, only
    for GPUs. Otherwise, or without it: the equations.
    """
    operation = _private("ops.aten._thnn_fused_lstm_cell_backward_impl") if fused else None
    if operation is not None:
        gradients, d_before, _ = operation(d_outputs, d_cells, before, cells, activated, False)
        return gradients, d_before
    i, f, g, o = activated.chunk(4, 1)
    squashed = cells.tanh()
    d_cell = d_outputs * o * (1 - squashed * squashed)
    if d_cells is not None:
        d_cell = d_cell + d_cells
    gates = [
        d_cell * g * i * (1 - i),
        d_cell * before * f * (1 - f),
        d_cell * i * (1 - g * g),
        d_outputs * squashed * o * (1 - o),
    ]
    return torch.cat(gates, 1), d_cell * f


def adamw_(
    values: Tensor,
    gradients: Tensor,
    moments: tuple[Tensor, Tensor],
    steps: Tensor,
    rate: Tensor,
    divisor: Tensor,
    *,
    betas: tuple[float, float],
    decay: float,
    eps: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019) on (P,) float32 values and moments, in place.

    gradients: (P,) float32, are divided by `divisor` first, and may be changed. moments: the moving
    averages of the gradient and of its square. steps: the number of steps, with this one. rate: the
    learning rate. steps, rate and divisor are scalars on the device of the values.

    `torch._fused_adamw_`, since 2.0, is the kernel behind `torch.optim.AdamW(fused=True)`, which
    would also import PyTorch's compiler, in a second and a half. Without it: the formula.
    """
    operation = _private("_fused_adamw_")
    if operation is not None:
        first, second = moments
        operation(
            *([values], [gradients], [first], [second], [], [steps]),
            lr=rate,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
        )
        return
    gradients.div_(divisor)
    values.mul_(1 - rate * decay)
    moments[0].lerp_(gradients, 1 - betas[0])
    moments[1].mul_(betas[1]).addcmul_(gradients, gradients, value=1 - betas[1])
    root = (moments[1] / (1 - betas[1] ** steps)).sqrt_().add_(eps)
    values.sub_(moments[0] / root * (rate / (1 - betas[0] ** steps)))


def copy_all_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, in one kernel.

    `torch._foreach_copy_`, since 2.1. Without it: one copy after the other.
    """
    operation = _private("_foreach_copy_")
    if operation is not None:
        operation(list(targets), list(sources))
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def version(tensor: Tensor) -> int:
    """A number that changes whenever PyTorch writes to the tensor's memory.

    `Tensor._version`, since 1.13 or earlier, which autograd relies on. Else: another number at each
    call, so that the tensor always seems changed.
    """
    if _private("Tensor._version") is None:
        return next(_other_numbers)
    return tensor._version


_other_numbers = itertools.count(-1, -1)


# Modules.


def copy_module(module: nn.Module, tensors: dict[int, Any]) -> nn.Module:
    """A copy of a module and all below it, with other parameters and buffers.

    tensors: what stands in the copy in place of each of them, by its `id`. All other attributes are
    shared with the original.

    `Module._parameters`, `_buffers` and `_modules`, since 1.13 or earlier, and what
    `Module._replicate_for_data_parallel` does with them: it takes a seventh of the time of
    `copy.deepcopy`, which copies thousands of empty tables of hooks. Without it: `copy.deepcopy`.
    """
    if _private("nn.Module._replicate_for_data_parallel") is None:
        return copy.deepcopy(module, dict(tensors))
    return _copied(module, dict(tensors))


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """memo: by `id`, the copies of tensors and of modules, which may be in several places."""
    if id(module) not in memo:
        copied = memo[id(module)] = module.__new__(type(module))
        vars(copied).update(vars(module))
        for kind in ("_parameters", "_buffers"):
            table = vars(module)[kind].items()
            vars(copied)[kind] = {k: v if v is None else memo[id(v)] for k, v in table}
        below = vars(module)["_modules"].items()
        vars(copied)["_modules"] = {k: v if v is None else _copied(v, memo) for k, v in below}
    return memo[id(module)]  # type: ignore[no-any-return]
