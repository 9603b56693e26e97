"""timm's networks without their heads, an optional extra: `cap[timm]`."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.encoder.errors import EncoderError, MissingPackageError
from pipeline.encoder.fusion.batchnorm import BATCHNORMS, has_batchnorm
from pipeline.encoder.networks.headless import Headless
from pipeline.encoder.networks.sources import TIMM
from pipeline.encoder.networks.torchvision_models import classifiers
from pipeline.encoder.shapes import run_on_meta
from pipeline.photos.preprocessing import Preprocessing
from train.option import nearest, or_list
from train.torch_import import import_meta_kernels, seeded_generator, without_compiler

_SEED = 0
_CALIBRATION_IMAGES = 8


def timm_network(name: str, *, pretrained: bool = False) -> Headless:
    """One of timm's networks, which ends in its pooled vector (`num_classes=0`).

    name: with `timm:` in front. pretrained: with the weights that timm downloads for this name;
    otherwise with weights that are drawn from a fixed seed. Size, filter, mean and std are those of
    timm's data configuration for the name. Raises EncoderError.
    """
    timm = _package()
    own_name = name.removeprefix(TIMM)
    _check_name(timm, name, own_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        try:
            network: nn.Module = timm.create_model(own_name, pretrained=pretrained, num_classes=0)
        except Exception as error:  # of the network's code, of downloads: a dozen kinds
            reason = _first_line(error)
            if not pretrained:
                raise EncoderError(f"{name}: timm cannot build it ({reason})") from None
            raise EncoderError(
                f"cannot download the weights of {name} ({reason}); give a file with "
                "--weights PATH, or download them where there is a network and copy the folder "
                "~/.cache/huggingface"
            ) from None
    network.eval()
    preprocessing, size = _wanted(timm, network, name)
    return Headless(network, _feature_dim(network, size, name), preprocessing, size)


def timm_names(pattern: str = "") -> list[str]:
    """timm's names of networks, sorted; those that match a pattern such as `vit*`. Raises
    EncoderError if timm is missing.
    """
    timm = _package()
    names = {*timm.list_models(pattern), *timm.list_models(pattern, pretrained=True)}
    return sorted(names)


def measure_batchnorm(network: nn.Module, image_size: int) -> None:
    """Give BatchNorms the statistics of seeded images, as `random_network` does and why."""
    if not has_batchnorm(network):
        return
    generator = seeded_generator(_SEED)
    coarse = torch.randn(_CALIBRATION_IMAGES, 3, 14, 14, generator=generator)
    images = nn.functional.interpolate(coarse, (image_size, image_size), mode="bicubic")
    batchnorms = [module for module in network.modules() if isinstance(module, BATCHNORMS)]
    momenta = [module.momentum for module in batchnorms]
    for module in batchnorms:
        module.momentum = None  # the plain average over all passes, here over one
        module.train()  # the others stay as they are: none drops or draws anything
    with torch.no_grad():
        network(images)
    for module, momentum in zip(batchnorms, momenta, strict=True):
        module.momentum = momentum
    network.eval()


def as_timm_names(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file by the names of timm's network.

    Some networks have a function in timm that renames the tensors of their authors' files. It is
    used if names are missing.
    """
    own = network.state_dict().keys()
    rename = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rename is None or own <= state.keys():
        return dict(state)
    try:
        renamed = rename(dict(state), network)
    except Exception:  # the tensors are of another network, as their names will show
        return dict(state)
    return dict(renamed) if isinstance(renamed, Mapping) else dict(state)


def resize_network(network: nn.Module, name: str, image_size: int) -> None:
    """Prepare a network that is made for one image size for another, as timm does: position
    embeddings are resampled, windows and grids made anew. Most need nothing of it.

    Raises EncoderError if the size does not fit.
    """
    set_size = getattr(network, "set_input_size", None)
    if set_size is None:
        return
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    for side in patch if isinstance(patch, tuple) else ():
        if image_size % side:  # timm leaves the rest of the photo out
            fits = image_size // side * side
            raise EncoderError(
                f"{name} cannot take {image_size}×{image_size} pixels: it sees patches of {side}; "
                f"{f'{fits} or ' if fits else ''}{fits + side} would fit"
            )
    try:
        set_size(img_size=(image_size, image_size))
    except Exception as error:  # whatever the network's code raises
        raise EncoderError(
            f"{name} cannot take {image_size}×{image_size} pixels ({_first_line(error)})"
        ) from None


def _package() -> ModuleType:
    classifiers()  # timm imports torchvision, which is faster in our way
    if "timm" in sys.modules:
        return sys.modules["timm"]
    try:
        try:
            with without_compiler():
                timm = importlib.import_module("timm")
        except ModuleNotFoundError as error:
            if error.name == "timm":
                raise
            timm = _with_compiler()
        except (ImportError, AttributeError):  # a later timm may need more of the compiler
            timm = _with_compiler()
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "timm"
        reason = "timm is not installed" if missing else f"timm fails ({_first_line(error)})"
        raise MissingPackageError(f"{reason}; install it with pip install 'cap[timm]'") from None
    logging.getLogger("timm").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports each of many tries
    return timm


def _with_compiler() -> ModuleType:
    import_meta_kernels()  # the compiler expects them to be there
    return importlib.import_module("timm")


def _check_name(timm: ModuleType, name: str, own_name: str) -> None:
    if not timm.is_model(own_name):
        near = nearest(own_name, timm.list_models())
        advice = f"; did you mean {or_list([TIMM + each for each in near])}?" if near else ""
        raise EncoderError(f"timm has no network {own_name!r}{advice}")
    architecture, _, tag = own_name.partition(".")
    if tag and own_name not in (known := timm.list_models(f"{architecture}.*", pretrained=True)):
        names = or_list([TIMM + each for each in known[:4]]) if known else "none"
        raise EncoderError(f"timm has no weights {tag!r} of {architecture}; there is {names}")


def _wanted(timm: ModuleType, network: nn.Module, name: str) -> tuple[Preprocessing, int]:
    config: dict[str, Any] = importlib.import_module("timm.data").resolve_model_data_config(network)
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise EncoderError(
            f"{name} takes {channels} channels of {height}×{width}, not square RGB photos; choose "
            "another backbone"
        )
    try:
        made = Preprocessing(
            config["interpolation"],
            tuple(map(float, config["mean"])),  # type: ignore[arg-type]
            tuple(map(float, config["std"])),  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise EncoderError(f"{name} wants other pixels ({error}); choose another") from None
    return made, int(height)


def _feature_dim(network: nn.Module, size: int, name: str) -> int:
    """The length of the vector that the network gives for a photo. Raises EncoderError if it gives
    something else.
    """
    try:
        features = run_on_meta(network, (2, 3, size, size))
    except Exception:  # some code cannot compute shapes alone
        with torch.inference_mode():
            features = network(torch.zeros(2, 3, size, size))
    if isinstance(features, Tensor) and features.dim() == 2 and len(features) == 2:
        return int(features.shape[1])
    found = tuple(features.shape[1:]) if isinstance(features, Tensor) else type(features).__name__
    raise EncoderError(
        f"{name} gives {found} for a photo and not one vector; choose another backbone"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__
