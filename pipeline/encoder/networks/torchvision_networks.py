"""torchvision's classifiers without their heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.headless import Headless
from pipeline.encoder.networks.known_backbones import BACKBONE_NAMES
from pipeline.encoder.networks.torchvision_models import classifiers
from train.option import nearest, or_list


def headless_network(name: str, device: str) -> Headless:
    """A torchvision classifier with its last linear layer replaced by the identity.

    device: `meta` for shapes without numbers, `cpu` for random weights from the global generator.
    Raises EncoderError.
    """
    try:
        with torch.device(device), _SkipInitialization(device):
            network: nn.Module = classifiers().get_model(name, weights=None, **_options(name))
    except NotImplementedError:  # RegNets compute their widths with tensors
        if device == "cpu":
            raise
        return headless_network(name, "cpu")
    except ValueError:
        near = nearest(name, BACKBONE_NAMES)
        advice = f"did you mean {or_list(near)}? `cap backbones`" if near else "`cap backbones`"
        raise EncoderError(f"torchvision has no backbone {name!r}; {advice} lists them") from None
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise EncoderError(f"{name} does not end in a linear layer; choose another backbone")
    head = network.get_submodule(linear[-1])
    assert isinstance(head, nn.Linear)
    network.set_submodule(linear[-1], nn.Identity())
    return Headless(network, head.in_features)


def _options(name: str) -> dict[str, bool]:
    """Two constructors announce another default of this option, unless they are given it. Filtering
    the warning would change the filters of the whole process, for its other threads too.
    """
    return {"init_weights": True} if name.lower() in ("googlenet", "inception_v3") else {}


# The functions that draw initial weights, as far as a mode sees them: it sees a call of a function
# of torch.nn.init, but not what this function calls.
_DRAWING = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_)


class _SkipInitialization(TorchFunctionMode):
    """Skips the drawing of weights on the meta device, where they have no numbers.

    Otherwise PyTorch would import its compiler to draw nothing.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._skips = device == "meta"

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self._skips and func in _DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
