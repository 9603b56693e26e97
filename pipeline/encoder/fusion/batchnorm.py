"""Folding BatchNorm into the convolutions before it, in a traced copy of the network."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from pipeline.encoder.fusion.plain_modules import Tracer, replace_by_plain, skip_identities
from train.private_torch import copy_module

# While torch.fx traces, it changes how all modules of the process are called: no other thread may
# run a network meanwhile.
TRACING = threading.Lock()

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def has_batchnorm(network: nn.Module) -> bool:
    return any(isinstance(m, BATCHNORMS) for m in network.modules())


def fold_batchnorm(network: nn.Module) -> nn.Module:
    """A traced copy with each BatchNorm folded into the convolution before it, if there is one.

    What is not folded shares its memory with `network`, until it is moved or converted. A network
    that torch.fx cannot trace is copied as it is: it runs, only slower.
    """
    copied = copy_with(network, lambda tensor: tensor)  # the same memory
    try:
        with TRACING:
            replace_by_plain(copied)
            graph = Tracer().trace(copied)
            traced = fx.GraphModule(copied, graph)
    except Exception:  # whatever the network's code raises when it is given symbols
        return copied.eval().requires_grad_(False)
    modules = dict(traced.named_modules())
    skip_identities(traced.graph, modules)
    for node in list(traced.graph.nodes):
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or len(before.users) > 1:
            continue
        convolution, batchnorm = called_module(before, modules), called_module(node, modules)
        if type(convolution) is not nn.Conv2d or type(batchnorm) is not nn.BatchNorm2d:
            continue
        if not batchnorm.track_running_stats:
            continue
        before.target = f"folded_{before.name}"
        modules[before.target] = _folded(convolution, batchnorm)
        traced.add_module(before.target, modules[before.target])
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval().requires_grad_(False)


def called_module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """The module that this node of a graph calls; None if it calls a function or nothing."""
    return modules[str(node.target)] if node.op == "call_module" else None


def copy_with(network: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy whose parameters and buffers are `change` of the originals. It is frozen."""
    tensors: dict[int, Any] = {
        id(p): nn.Parameter(change(p.detach()), False) for p in network.parameters()
    }
    tensors.update((id(buffer), change(buffer.detach())) for buffer in network.buffers())
    return copy_module(network, tensors)


def _folded(convolution: nn.Conv2d, batchnorm: nn.BatchNorm2d) -> nn.Module:
    """A convolution that computes what both compute one after the other, in eval mode."""
    assert batchnorm.running_mean is not None
    assert batchnorm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        batchnorm.running_mean,
        batchnorm.running_var,
        batchnorm.eps,
        batchnorm.weight,
        batchnorm.bias,
    )
    folded = copy_module(convolution, {id(p): p for p in convolution.parameters()})
    folded.weight, folded.bias = weight, bias
    return folded
