"""Fusing each convolution of the backbone with the operations that follow it.

An eager network writes the result of each convolution to memory and reads it again for BatchNorm,
for the sum with the shortcut and for ReLU. Here BatchNorm is folded into the weights (`batchnorm`),
and sum and activation are computed by the kernel of the convolution: by oneDNN's fused convolutions
on a CPU, with weights whose memory layout is converted once, and by cuDNN's on a GPU. PyTorch's
compiler would choose the same kernels, but takes half a minute.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from pipeline.encoder.fusion.batchnorm import called_module
from train import private_torch

# The activations that oneDNN can apply to the result of a convolution: its name and parameters.
_ACTIVATIONS: dict[type[nn.Module], tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.Hardswish: ("hardswish", []),
    nn.SiLU: ("swish", []),
    nn.Sigmoid: ("sigmoid", []),
}
_ACTIVATION_FUNCTIONS: dict[Callable[..., Tensor], type[nn.Module]] = {
    functional.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    functional.relu6: nn.ReLU6,
}
_SUMS = (operator.add, operator.iadd, torch.add)


def fuse_convolutions(
    network: nn.Module, device: torch.device, dtype: torch.dtype, *, typical_batch: int
) -> nn.Module:
    """The network with fused convolutions, on `device` in `dtype`, channels last in memory.

    network: from `fold_batchnorm`; it is changed and must not be used any more. A network that
    could not be traced is moved and converted, but not fused. On a CPU, the weights get their
    memory layout when the network first runs: for photos of that size and `typical_batch` of them.
    Other sizes and batches work, too.
    """
    network = network.to(device, dtype)
    for tensor in chain(network.parameters(), network.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    if device.type == "cpu":
        _replace_max_pools(network)
    if not isinstance(network, fx.GraphModule) or not _has_kernels(device, dtype):
        return network
    make = _OneDnnConvolution if device.type == "cpu" else _CudnnConvolution
    modules = dict(network.named_modules())
    network.graph.eliminate_dead_code()
    # Going through the nodes in order, and putting a fused node where the last of its nodes was,
    # keeps every sum behind both of its inputs.
    for node in list(network.graph.nodes):
        convolution = called_module(node, modules)
        if not isinstance(convolution, nn.Conv2d) or not _is_plain(convolution):
            continue
        replaced = _match(node, modules, make)
        if replaced is None:
            continue
        last, other, activation = replaced
        dead = [node]
        while dead[-1] is not last:
            dead.append(next(iter(dead[-1].users)))
        in_place = other is not None and _is_free_after(other, dead, modules)
        fused = make(convolution, activation, typical_batch, in_place)
        network.add_module(f"fused_{node.name}", fused)
        with network.graph.inserting_before(last):
            arguments = (node.args[0],) if other is None else (node.args[0], other)
            new = network.graph.call_module(f"fused_{node.name}", arguments)
        last.replace_all_uses_with(new)
        modules[f"fused_{node.name}"] = fused
        for old in reversed(dead):
            network.graph.erase_node(old)
    network.graph.lint()
    network.delete_all_unused_submodules()
    network.recompile()
    return network.eval().requires_grad_(False)


class _MaxPool3(nn.Module):
    """3×3 maxima at stride 2, padding 1, channels last: three times as fast as torch's on a CPU.

    torch's max-pooling also finds the positions of the maxima, and converts every bfloat16.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, ⌈H/2⌉, ⌈W/2⌉)."""
        # One photo after the other, because one photo fits into the CPU's cache.
        return torch.cat([_max3(_max3(photo, 3), 2) for photo in x.split(1)])


def _max3(x: Tensor, dim: int) -> Tensor:
    """Maxima of the elements 2i - 1, 2i and 2i + 1 along a dimension."""
    before: tuple[slice, ...] = (slice(None),) * dim
    even, odd = x[(*before, slice(0, None, 2))], x[(*before, slice(1, None, 2))]
    if even.shape == odd.shape:
        maxima = torch.maximum(even, odd)
    else:  # the last element has no right neighbour
        maxima = even.clone()
        left = maxima.narrow(dim, 0, odd.shape[dim])
        torch.maximum(left, odd, out=left)
    right = maxima.narrow(dim, 1, even.shape[dim] - 1)
    torch.maximum(right, odd.narrow(dim, 0, even.shape[dim] - 1), out=right)
    return maxima


def _replace_max_pools(network: nn.Module) -> None:
    for name, pool in list(network.named_modules()):
        if isinstance(pool, nn.MaxPool2d) and not pool.return_indices and not pool.ceil_mode:
            sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
            if [size if isinstance(size, tuple) else (size, size) for size in sizes] == [
                (3, 3),
                (2, 2),
                (1, 1),
                (1, 1),
            ]:
                network.set_submodule(name, _MaxPool3())


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are fused kernels for this device and precision.

    oneDNN has bfloat16 convolutions only for CPUs with instructions for them. cuDNN's fused kernels
    are made for half precision; float32 on a GPU is a reference, its speed does not matter.
    """
    if device.type != "cpu":
        return dtype is not torch.float32
    if dtype is torch.float32:
        return True
    return dtype is torch.bfloat16 and private_torch.has_bfloat16_convolutions()


def _is_plain(convolution: nn.Conv2d) -> bool:
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


class _OneDnnConvolution(nn.Module):
    """act(conv(x) + other), by oneDNN. (B, C, H, W) channels last, in and out."""

    def __init__(
        self,
        convolution: nn.Conv2d,
        activation: type[nn.Module] | None,
        typical_batch: int,
        in_place: bool,
    ) -> None:
        super().__init__()
        self.geometry = _geometry(convolution)
        self.name, self.parameters_ = _ACTIVATIONS[activation] if activation else ("none", [])
        self.in_place = in_place
        self.typical_batch = typical_batch
        # Plain attributes, because tensors in oneDNN's own layout cannot be moved, copied or saved.
        # The plain weight goes when there is a layout. A photo alone has one of its own: with that
        # of a batch, some processors convert the weight at every call, in three times the time.
        self.weight: Tensor | None = convolution.weight.detach()
        self.layouts: dict[bool, Tensor] = {}  # by whether a photo is alone
        self.bias = None if convolution.bias is None else convolution.bias.detach()

    @classmethod
    def takes(cls, activation: type[nn.Module] | None, with_sum: bool) -> bool:
        return activation in _ACTIVATIONS and not (with_sum and activation is not nn.ReLU)

    def _laid_out(self, x: Tensor) -> Tensor:
        """The weight for inputs of this size."""
        alone = len(x) == 1
        if alone not in self.layouts:
            weight = self.weight
            if weight is None:
                (other,) = self.layouts.values()
                try:
                    weight = other.to_dense() if other.is_mkldnn else other
                except RuntimeError:  # this layout does for all sizes, only slower
                    weight = other
                if weight.is_mkldnn or weight.dtype is not x.dtype:
                    self.layouts[alone] = other
                    return other
            sizes = [1 if alone else self.typical_batch, *x.shape[1:]]
            self.layouts[alone] = private_torch.lay_out_convolution_weight(
                weight, self.geometry, sizes
            )
            self.weight = None
        return self.layouts[alone]

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return private_torch.convolution(
            x,
            self._laid_out(x),
            self.bias,
            self.geometry,
            self.name,
            self.parameters_,
            other,
            in_place=self.in_place,
        )


class _CudnnConvolution(nn.Module):
    """relu(conv(x) + other), by cuDNN. (B, C, H, W) channels last, in and out."""

    def __init__(
        self,
        convolution: nn.Conv2d,
        activation: type[nn.Module] | None,
        typical_batch: int,
        in_place: bool,
    ) -> None:
        super().__init__()
        self.geometry = _geometry(convolution)
        self.weight = convolution.weight.detach()
        self.bias = None if convolution.bias is None else convolution.bias.detach()

    @classmethod
    def takes(cls, activation: type[nn.Module] | None, with_sum: bool) -> bool:
        return activation is nn.ReLU

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return private_torch.cudnn_convolution(x, self.weight, self.bias, self.geometry, other)


_Fused = type[_OneDnnConvolution] | type[_CudnnConvolution]


def _geometry(convolution: nn.Conv2d) -> private_torch.Geometry:
    """(padding, stride, dilation, groups)."""
    return (
        [int(p) for p in convolution.padding],
        list(convolution.stride),
        list(convolution.dilation),
        convolution.groups,
    )


def _match(
    node: fx.Node, modules: dict[str, nn.Module], make: _Fused
) -> tuple[fx.Node, fx.Node | None, type[nn.Module] | None] | None:
    """What can be fused with the convolution at `node`: (last node, other summand, activation).

    None if there is nothing and the kernel of `make` does not compute lone convolutions.
    """
    after = _only_user(node)
    activation = _activation(after, modules)
    if after is not None and activation is not None and make.takes(activation, with_sum=False):
        return after, None, activation
    if after is not None and _is_sum(after):
        first, second = after.args
        other = second if first is node else first
        if isinstance(other, fx.Node) and other is not node:
            end = _only_user(after)
            activation = _activation(end, modules)
            if end is not None and activation is not None and make.takes(activation, with_sum=True):
                return end, other, activation
            if make is _OneDnnConvolution:
                return after, other, None
    return (node, None, None) if make is _OneDnnConvolution else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(node: fx.Node | None, modules: dict[str, nn.Module]) -> type[nn.Module] | None:
    """The activation that this node computes; None if it computes something else."""
    if node is None:
        return None
    if node.op == "call_function":
        return _ACTIVATION_FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    kind = type(called_module(node, modules))
    return kind if kind in _ACTIVATIONS else None


def _is_sum(node: fx.Node) -> bool:
    plain = len(node.args) == 2 and not node.kwargs  # torch.add may have an `alpha`
    return node.op == "call_function" and node.target in _SUMS and plain


def _is_free_after(other: fx.Node, fused: list[fx.Node], modules: dict[str, nn.Module]) -> bool:
    """Whether the sum may overwrite `other`: a new tensor that nothing reads after the last of the
    fused nodes, and that the first of them, the convolution, does not read while the sum is
    written, itself or a view of it.
    """
    # Modules that return a new tensor, and no view of another.
    makes_new = (nn.Conv2d, nn.MaxPool2d, _MaxPool3, _OneDnnConvolution)
    if not isinstance(called_module(other, modules), makes_new):
        return False
    convolution, last = fused[0], fused[-1]
    order = {node: position for position, node in enumerate(last.graph.nodes)}
    return all(
        order[user] <= order[last]
        and user is not convolution
        and (user in fused or isinstance(called_module(user, modules), makes_new))
        for user in other.users
    )
