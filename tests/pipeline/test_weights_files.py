"""Files as trainings write them: the network's tensors are found in them, and nothing is run."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from pipeline.encoder.backbone import Backbone
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.networks.files.weights_files import read_state_dicts
from pipeline.encoder.weights import load_backbone

NAME = "shufflenet_v2_x0_5"
State = dict[str, Tensor]


def drawn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made: nn.Module = models.get_model(NAME, weights=None)
    return made


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return drawn(3)


@pytest.fixture(scope="module")
def state(network: nn.Module) -> State:
    return dict(network.state_dict())


@pytest.fixture(scope="module")
def sha256(state: State, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("plain") / "w.pth"
    torch.save(state, path)
    return load_backbone(NAME, str(path)).weights_sha256


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., Backbone]:
    def load(content: object, **options: Any) -> Backbone:
        torch.save(content, tmp_path / "w.pth", **options)
        return load_backbone(NAME, str(tmp_path / "w.pth"))

    return load


class Settings(dict[str, Any]):
    """Stands for a class that the reader of a file does not have."""


class Callback:
    def __init__(self) -> None:
        self.best = Path("best.ckpt")


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("place", ["state_dict", "model", "model_state_dict", "net", "weights"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_state_dict_is_found_below_any_key(
    place: str, prefix: str, state: State, sha256: str, loaded: Callable[..., Backbone]
) -> None:
    content = {place: prefixed(prefix, state), "epoch": 3, "best": torch.tensor(0.5)}
    assert loaded(content).weights_sha256 == sha256


@pytest.mark.parametrize(
    "prefix",
    [
        *("model.", "backbone.", "encoder.", "resnet.", "_orig_mod.", "module.model.backbone."),
        *("model._orig_mod.", "net.0.", "captioner.encoder.cnn."),
    ],
)
def test_names_may_have_those_of_modules_around_the_network_in_front(
    prefix: str, state: State, sha256: str, loaded: Callable[..., Backbone]
) -> None:
    other = {"decoder.lstm.weight": torch.ones(3), "decoder.conv1.0.weight": torch.ones(4)}
    backbone = loaded(other | prefixed(prefix, state))
    assert backbone.weights_sha256 == sha256
    assert backbone.notices == ()
    shown = prefix.replace("module.", "").replace("_orig_mod.", "")
    assert (f"from {shown}*" in "".join(backbone.details)) == bool(shown)


def test_wrappers_may_stand_within_a_name(
    state: State, sha256: str, loaded: Callable[..., Backbone]
) -> None:
    inside = {name.replace(".branch2.", ".branch2.module."): t for name, t in state.items()}
    assert inside.keys() != state.keys()
    assert loaded(inside).weights_sha256 == sha256


@pytest.mark.parametrize("prefix", ["", "resnet."])
def test_a_network_cut_into_a_sequence_is_known_by_its_numbers(
    prefix: str, network: nn.Module, sha256: str, loaded: Callable[..., Backbone]
) -> None:
    """As captioning tutorials cut off the head."""
    cut = nn.Sequential(*list(network.children())[:-1])
    assert "0.0.weight" in cut.state_dict()
    assert loaded(prefixed(prefix, cut.state_dict())).weights_sha256 == sha256


def test_the_only_part_with_tensors_may_be_alone(tmp_path: Path) -> None:
    torch.manual_seed(4)
    whole = models.mnasnet0_5()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    torch.save(whole.layers.state_dict(), tmp_path / "part.pth")
    first, second = (
        load_backbone("mnasnet0_5", str(tmp_path / name)).weights_sha256
        for name in ("w.pth", "part.pth")
    )
    assert first == second


def test_heads_may_have_any_size_or_be_missing(
    state: State, sha256: str, loaded: Callable[..., Backbone]
) -> None:
    body = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    assert loaded(body).weights_sha256 == sha256
    assert loaded({**body, "fc.weight": torch.ones(7, 1024)}).weights_sha256 == sha256
    head = {f"fc.{number}.weight": torch.ones(5) for number in range(40)}
    assert loaded({**body, **head}).weights_sha256 == sha256
    counted = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    assert len(counted) < len(state)
    assert loaded(counted).weights_sha256 == sha256


def test_half_precision_and_safetensors_are_read_whatever_the_file_is_called(
    tmp_path: Path, state: State, sha256: str, loaded: Callable[..., Backbone]
) -> None:
    for name in ("w.safetensors", "w.bin"):
        save_file(prefixed("backbone.", state), tmp_path / name)
        assert load_backbone(NAME, str(tmp_path / name)).weights_sha256 == sha256
    halves = {n: t.half() if t.is_floating_point() else t for n, t in state.items()}
    backbone = loaded(halves)
    dtypes = {p.dtype for p in backbone.network.parameters()}
    assert dtypes == {torch.float32}
    assert backbone.weights_sha256 != sha256


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_foreign_classes_are_left_out(
    zipped: bool,
    protocol: int,
    state: State,
    sha256: str,
    loaded: Callable[..., Backbone],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """As in Lightning's checkpoints, which PyTorch refuses to read without running their code."""
    content = {
        "state_dict": OrderedDict(prefixed("model.", state)),
        "hyper_parameters": Settings(lr=0.1, root=pathlib.PurePosixPath("x")),
        "callbacks": {Callback: Callback()},
        "loops": defaultdict(list, fit=[1]),
        "args": argparse.Namespace(names={"a", "b"}),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    }
    options = {"_use_new_zipfile_serialization": zipped, "pickle_protocol": protocol}
    assert loaded(content, **options).weights_sha256 == sha256
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("zipped", [True, False])
def test_a_network_saved_as_an_object_is_read_without_its_classes(
    zipped: bool, network: nn.Module, sha256: str, loaded: Callable[..., Backbone]
) -> None:
    content = {"model": network, "epoch": 1}
    options = {"_use_new_zipfile_serialization": zipped}
    assert loaded(content, **options).weights_sha256 == sha256


def test_of_weights_and_their_average_the_average_is_taken_and_it_is_said(
    tmp_path: Path, state: State, sha256: str, loaded: Callable[..., Backbone]
) -> None:
    other = dict(drawn(5).state_dict())
    average = OrderedDict(n_averaged=torch.tensor(9), **prefixed("module.", state))
    backbone = loaded({"model": other, "model_ema": average})
    assert backbone.weights_sha256 == sha256
    assert backbone.notices == (
        f"{tmp_path}/w.pth: weights taken from model_ema; model would fit, too",
    )
    assert loaded({"state_dict_ema": state, "state_dict": other}).weights_sha256 == sha256
    one_dict = prefixed("student.", other) | prefixed("teacher.", state)
    assert loaded(one_dict).weights_sha256 == sha256


def test_of_weights_that_fit_as_well_the_first_are_taken(
    tmp_path: Path, state: State, sha256: str, loaded: Callable[..., Backbone]
) -> None:
    other = dict(drawn(5).state_dict())
    backbone = loaded({"g": state, "h": other, "copy": state})
    assert backbone.weights_sha256 == sha256
    assert backbone.notices == (f"{tmp_path}/w.pth: weights taken from g; h would fit, too",)


def test_another_network_is_refused_by_the_first_tensor_that_differs(
    tmp_path: Path, state: State, loaded: Callable[..., Backbone]
) -> None:
    path = f"{tmp_path}/w.pth: not weights of {NAME}"
    lacking = {n: t for n, t in prefixed("model.", state).items() if "conv5.0.w" not in n}
    with pytest.raises(EncoderError) as caught:
        loaded(lacking)
    assert str(caught.value) == f"{path} (no model.conv5.0.weight)"
    with pytest.raises(EncoderError) as caught:
        loaded({**state, "conv5.0.weight": torch.ones(2, 3)})
    assert str(caught.value) == f"{path} (conv5.0.weight is (2, 3), must be (1024, 192, 1, 1))"
    deeper = {f"stage4.9.branch1.{number}.weight": torch.ones(2) for number in range(20)}
    with pytest.raises(EncoderError) as caught:
        loaded({**state, **deeper})
    assert str(caught.value) == (
        f"{path} (it has 20 tensors more: stage4.9.branch1.0.weight, stage4.9.branch1.1.weight, "
        "stage4.9.branch1.2.weight, …)"
    )
    assert loaded({**state, "stage4.9.total_ops": torch.ones(1)}).feature_dim == 1024


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_hostile_file_runs_nothing(protocol: int, tmp_path: Path, state: State) -> None:
    marks = [tmp_path / f"ran{number}" for number in range(4)]
    hostile = [
        Runs(os.system, f"touch {marks[0]}"),
        Runs(os.mkdir, str(marks[1])),
        Runs(eval, f"open({str(marks[2])!r}, 'w')"),
        Runs(getattr, Path(marks[3]), "touch"),
    ]
    torch.save({"model": state, "more": hostile}, tmp_path / "w.pth", pickle_protocol=protocol)
    assert load_backbone(NAME, str(tmp_path / "w.pth")).feature_dim == 1024
    torch.save(hostile, tmp_path / "w.pth", pickle_protocol=protocol)
    with pytest.raises(EncoderError, match="holds no state dict"):
        load_backbone(NAME, str(tmp_path / "w.pth"))
    assert not any(mark.exists() for mark in marks)


def test_a_hostile_file_changes_nothing_that_others_use(tmp_path: Path) -> None:
    """By the operation that gives an object its attributes, on what a file may name."""
    before = dict(vars(torch.Tensor))
    for module, name in (
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch", "Size"),
        ("torch", "float32"),
        ("collections", "OrderedDict"),
        ("torch", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
    ):
        attributes = (None, {"__call__": 1, "numel": 1, "__defaults__": (1,)})
        given = pickle.dumps(attributes, 2)[2:-1]  # without the beginning and the end
        data = b"\x80\x02c" + f"{module}\n{name}\n".encode() + given + b"b."
        path = tmp_path / "w.pth"
        header = [0x1950A86A20F9469CFC6C, 1001, {}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in header) + data)
        with pytest.raises(EncoderError, match=r"not a weights file|holds no state dict"):
            read_state_dicts(path)
    assert dict(vars(torch.Tensor)) == before
    assert torch.equal(pickle.loads(pickle.dumps(torch.ones(3))), torch.ones(3))


def test_torchscript_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        scripted = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
        torch.jit.save(scripted, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match=r"a TorchScript archive; save the network's state_dict"):
        load_backbone(NAME, str(tmp_path / "w.pt"))


def test_a_damaged_file_is_one_line(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "whole.pth")
    data = (tmp_path / "whole.pth").read_bytes()
    for cut in (0, 1, 9, 1000, len(data) // 2, len(data) - 1):
        (tmp_path / "w.pth").write_bytes(data[:cut])
        with pytest.raises(EncoderError) as caught:
            load_backbone(NAME, str(tmp_path / "w.pth"))
        assert "not a weights file (" in str(caught.value)
        assert "\n" not in str(caught.value)
