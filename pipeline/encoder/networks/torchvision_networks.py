"""torchvision's classifiers without their heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.headless import Headless
from pipeline.encoder.networks.known_backbones import BACKBONE_NAMES
from pipeline.encoder.networks.torchvision_models import classifiers
from pipeline.photos.preprocessing import BICUBIC, BILINEAR, Preprocessing
from train.option import nearest, or_list

# Networks that were trained in TensorFlow. With weights, torchvision sets their `transform_input`:
# they turn ImageNet's mean and standard deviation into 0.5 themselves. Here, the pixels have them.
_TRANSFORMED = ("googlenet", "inception_v3")


def headless_network(name: str, device: str, image_size: int | None = None) -> Headless:
    """A torchvision classifier with its head, the last linear layer, replaced by the identity.

    device: `meta` for shapes without numbers, `cpu` for random weights from the global generator.
    image_size: that a network of one size is built for; its own by default. Preprocessing and image
    size are those of torchvision's default weights. Raises EncoderError.
    """
    models = classifiers()
    if name.lower() not in models.list_models(module=models):
        raise EncoderError(_not_a_classifier(name))
    network = _built(name, device, image_size)
    preprocessing, size = published_preprocessing(name)
    if has_one_size(name):  # torchvision's default weights may be for another than the constructor
        size = image_size or int(getattr(network, "image_size", size))
    return Headless(network, _remove_head(name, network), preprocessing, size)


def has_one_size(name: str) -> bool:
    """Whether the network has to be built for the size of its images."""
    return _size_option(name) is not None


def published_preprocessing(name: str, weights: str = "DEFAULT") -> tuple[Preprocessing, int]:
    """(preprocessing, image size) that torchvision publishes with weights. Of its preprocessing,
    what part of a photo is shown is left to the views. weights: their name, or a path: the weights
    that torchvision publishes under the name of this file, or else the default ones.
    """
    published = classifiers().get_model_weights(name)
    by_file = {Path(entry.url).name: entry for entry in published}
    entry = by_file.get(Path(weights).name)
    if entry is None:
        entry = getattr(published, weights if weights in published.__members__ else "DEFAULT")
    transforms = entry.transforms()
    filter = BICUBIC if transforms.interpolation.value == BICUBIC else BILINEAR
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    if name.lower() in _TRANSFORMED:
        mean = std = (0.5, 0.5, 0.5)
    return Preprocessing(filter, mean, std), int(transforms.crop_size[0])


def _built(name: str, device: str, image_size: int | None) -> nn.Module:
    options = _options(name)
    option = _size_option(name)
    if option is not None and image_size is not None:
        options[option] = (image_size, image_size) if option == "input_size" else image_size
    try:
        with torch.device(device), _SkipInitialization(device):
            network: nn.Module = classifiers().get_model(name, weights=None, **options)
    except NotImplementedError:  # RegNets compute their widths with tensors
        if device == "cpu":
            raise
        return _built(name, "cpu", image_size)
    except (AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise EncoderError(
            f"{name} cannot take {image_size}×{image_size} pixels ({reason})"
        ) from None
    return network


def _remove_head(name: str, network: nn.Module) -> int:
    """Replace the head by the identity. Returns the number of features."""
    if isinstance(network, classifiers().SqueezeNet):  # its head is a convolution before the mean
        convolution = network.classifier[1]
        network.classifier = nn.AdaptiveAvgPool2d(1)
        return int(convolution.in_channels)
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise EncoderError(f"{name} does not end in a linear layer; choose another backbone")
    head = network.get_submodule(linear[-1])
    assert isinstance(head, nn.Linear)
    network.set_submodule(linear[-1], nn.Identity())
    return head.in_features


def _not_a_classifier(name: str) -> str:
    """What is said about a name that is no torchvision classifier."""
    models = classifiers()
    if name.lower() in models.list_models():
        kind = models.get_model_builder(name).__module__.split(".")[2].replace("_", " ")
        return (
            f"{name} is a network of torchvision for {_KINDS.get(kind, kind)}, not a classifier of "
            "photos; `cap backbones` lists those"
        )
    near = nearest(name, BACKBONE_NAMES)
    advice = f"did you mean {or_list(near)}? `cap backbones`" if near else "`cap backbones`"
    return f"torchvision has no backbone {name!r}; {advice} lists them"


_KINDS = {"quantization": "integers of 8 bits", "video": "videos"}


def _options(name: str) -> dict[str, Any]:
    """Two constructors announce another default of this option, unless they are given it. Filtering
    the warning would change the filters of the whole process, for its other threads too.
    """
    return {"init_weights": True} if name.lower() in _TRANSFORMED else {}


def _size_option(name: str) -> str | None:
    """The option of a constructor for the only size of images that the network takes, if any."""
    if name.lower().startswith("vit_"):
        return "image_size"
    return "input_size" if name.lower().startswith("maxvit_") else None


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
