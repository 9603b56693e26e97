"""`NAME+stages`: beside the vector of a network stand averages of the stages before it.

A network's own vector is what its head needs to tell the classes of ImageNet apart; what the stages
before it see of colours, textures and parts is partly gone. A stage is all modules one after the
other whose output has the same number of channels on a grid of the same size. Taken are the last
stages on the coarsest grid, at most two, without the one whose average is the network's own vector;
if there is no other, the last stage on the grid before it. A MobileNetV2 has 320 and 160 numbers
more, a ResNet the 1,024 of its `layer3`.

Each part is divided by its root mean square, photo by photo: otherwise the part with the largest
numbers would be nearly all that a decoder sees, and a scale that is measured on some photos would
make the features of others depend on them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.encoder.backbone import Backbone
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.fusion.plain_modules import replace_by_plain
from pipeline.encoder.shapes import run_on_meta

STAGES = "+stages"  # behind the name of a network

_MOST = 2
_LEAST_SQUARE = 1e-12  # of a photo without any features, as of one colour


@dataclass(frozen=True)
class _Output:
    """What a module of the network returns: `channels` on a grid of size × size."""

    module: str
    channels: int
    size: int
    axes: tuple[int, int]  # of the grid


def with_stages(backbone: Backbone) -> Backbone:
    """The backbone `NAME+stages` of the backbone NAME, whose network becomes a part of it.

    Raises EncoderError if it has no stages.
    """
    replace_by_plain(backbone.network)  # so that it can be traced
    outputs = list(_outputs(backbone))
    chosen = _stages(outputs, backbone.feature_dim)
    if not chosen:
        raise EncoderError(
            f"{backbone.name} has no stages of other features beside its vector; leave out {STAGES}"
        )
    return replace(
        backbone,
        name=backbone.name + STAGES,
        feature_dim=backbone.feature_dim + sum(stage.channels for stage in chosen),
        network=WithStages(backbone.network, chosen).eval().requires_grad_(False),
    )


def _outputs(backbone: Backbone) -> Iterator[_Output]:
    """The outputs with a grid, in the order in which they are computed: of the network's parts, as
    `layer3`, and of parts that follow one another in such a part, as `features.16`.
    """
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def noted(name: str) -> Callable[[nn.Module, Any, object], None]:
        def note(module: nn.Module, arguments: Any, output: object) -> None:
            if isinstance(output, Tensor):
                shapes.append((name, tuple(output.shape)))

        return note

    network, hooks = backbone.network, []
    for name, module in network.named_children():
        if isinstance(module, nn.Sequential):
            for below, part in module.named_children():
                hooks.append(part.register_forward_hook(noted(f"{name}.{below}")))
        hooks.append(module.register_forward_hook(noted(name)))
    run_on_meta(network, (2, 3, backbone.image_size, backbone.image_size))
    for hook in hooks:
        hook.remove()
    for name, shape in shapes:
        if len(shape) != 4:
            continue
        _, first, height, width = shape
        if height == width > 1:
            yield _Output(name, first, height, (2, 3))
        elif first == height > 1:  # channels last, as in a Swin transformer
            yield _Output(name, width, first, (1, 2))


def _stages(outputs: list[_Output], feature_dim: int) -> list[_Output]:
    """Those whose averages are to stand beside the network's vector, the last one first."""
    groups = groupby(outputs, key=lambda output: (output.size, output.channels))
    stages = [list(group)[-1] for _, group in groups]
    sizes = sorted({stage.size for stage in stages})
    if not sizes:
        return []
    coarsest = [
        stage
        for stage in reversed(stages)
        if stage.size == sizes[0] and stage.channels != feature_dim
    ]
    before = [stage for stage in reversed(stages) if len(sizes) > 1 and stage.size == sizes[1]]
    return coarsest[:_MOST] or [stage for stage in before[:1] if stage.channels != feature_dim]


class WithStages(nn.Module):
    """A network, and the averages of some of its modules' outputs: (B, 3, S, S) → (B, D)."""

    def __init__(self, network: nn.Module, stages: list[_Output]) -> None:
        """network: in which the modules get hooks."""
        super().__init__()
        self.network = network
        self._names = [stage.module for stage in stages]
        for stage in stages:
            module = network.get_submodule(stage.module)
            if not isinstance(module, nn.Sequential):
                # torch.fx does not run the hooks of PyTorch's own modules.
                module = nn.Sequential(module)
                network.set_submodule(stage.module, module)
            module.register_forward_hook(_noting(stage))

    def forward(self, x: Tensor) -> Tensor:
        # By thread, because copies of a network have the hooks in common.
        averages = _RUNNING.averages = dict[str, Tensor]()
        own = self.network(x)
        parts = [own, *(averages[name] for name in self._names)]
        return torch.cat([_of_one_scale(part) for part in parts], 1)


_RUNNING = threading.local()


def _noting(stage: _Output) -> Callable[[nn.Module, Any, Tensor], None]:
    def note(module: nn.Module, arguments: Any, output: Tensor) -> None:
        _RUNNING.averages[stage.module] = output.mean(stage.axes)

    return note


def _of_one_scale(part: Tensor) -> Tensor:
    """(B, D) divided by the root mean square of each row, in float32."""
    part = part.float()  # the squares are beyond float16
    return part * part.square().mean(1, keepdim=True).add(_LEAST_SQUARE).rsqrt()
