"""Modules of timm as compositions of PyTorch's own, which can be traced, folded and fused."""

from __future__ import annotations

import math

from torch import Tensor, fx, nn
from torch.nn import functional


class SamePadding(nn.Module):
    """Pads images with zeros as TensorFlow's `SAME` does: the result of the convolution behind it
    has ⌈size / stride⌉ pixels, and an odd number is padded more on the right and at the bottom.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self._axes = tuple(
            (kernel, stride, dilation)
            for kernel, stride, dilation in zip(
                convolution.kernel_size, convolution.stride, convolution.dilation, strict=True
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H', W')."""
        padding: list[int] = []
        for size, (kernel, stride, dilation) in zip(x.shape[-2:], self._axes, strict=True):
            reach = (math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1
            missing = max(reach - size, 0)
            padding = [missing // 2, missing - missing // 2, *padding]  # the last axis comes first
        return functional.pad(x, padding) if any(padding) else x


class Tracer(fx.Tracer):
    """Traces a network with these modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SamePadding) or super().is_leaf_module(m, module_qualified_name)


def replace_by_plain(network: nn.Module) -> None:
    """Put compositions of PyTorch's modules in the place of timm's, with the same tensors.

    network: a copy, which is changed.
    """
    for path, module in list(network.named_modules()):
        if not path or not type(module).__module__.startswith("timm."):
            continue
        kind = type(module).__name__
        if kind == "BatchNormAct2d" and isinstance(module, nn.BatchNorm2d):
            parts = [_as(nn.BatchNorm2d, module), *module.children()]  # a dropout, an activation
            network.set_submodule(path, nn.Sequential(*parts).eval())
        elif kind == "Conv2dSame" and isinstance(module, nn.Conv2d):
            parts = [SamePadding(module), _as(nn.Conv2d, module)]
            network.set_submodule(path, nn.Sequential(*parts).eval())


def skip_identities(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Take out of a graph what does nothing in eval mode, so that it does not stand between modules
    that can be fused.
    """
    for node in list(graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        if type(modules[str(node.target)]) in (nn.Identity, nn.Dropout, nn.Dropout2d):
            (before,) = node.args
            if isinstance(before, fx.Node):
                node.replace_all_uses_with(before)
                graph.erase_node(node)


def _as(kind: type[nn.Module], module: nn.Module) -> nn.Module:
    """The same tensors and settings as a module of a class that `module` inherits from."""
    made = kind.__new__(kind)
    vars(made).update(vars(module))
    vars(made)["_modules"] = {}
    return made
