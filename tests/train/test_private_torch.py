"""PyTorch's private operations compute the same as the public ways that replace them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.conftest import ROOT
from train import private_torch
from train.device import has_fast_bfloat16

CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["private", "public"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs each test with this PyTorch's private operations, and as if it had none of them."""
    if request.param == "public":
        monkeypatch.setattr(private_torch, "_private", lambda name: None)
    return str(request.param)


def test_every_private_operation_is_there_in_this_pytorch(way: str) -> None:
    """Otherwise the fast ways would be lost unnoticed."""
    if way == "public":
        pytest.skip("runs without the private operations")
    names = [
        *("ops.mkldnn._linear_pointwise", "ops.mkldnn._is_mkldnn_bf16_supported"),
        *("ops.mkldnn._reorder_convolution_weight", "ops.mkldnn._convolution_pointwise"),
        "ops.mkldnn._reorder_linear_weight",
        *("ops.mkldnn._convolution_pointwise_", "cudnn_convolution_relu"),
        *("cudnn_convolution_add_relu", "native_batch_norm"),
        *("ops.aten.tanh_backward.grad_input", "ops.aten.sigmoid_backward.grad_input"),
        *("_fused_adamw_", "Tensor._version"),
        *("ops.aten.native_batch_norm_backward", "ops.aten._thnn_fused_lstm_cell"),
        *("ops.aten._thnn_fused_lstm_cell_backward_impl", "_foreach_copy_"),
        "nn.Module._replicate_for_data_parallel",
    ]
    source = (ROOT / "train" / "private_torch.py").read_text(encoding="utf-8")
    resize = 'f"_C._nn._upsample_{filter}2d_aa"'  # one for each filter
    assert source.count(f"_private({resize})") == 1
    for filter in ("bilinear", "bicubic"):
        assert private_torch._private(f"_C._nn._upsample_{filter}2d_aa") is not None
    for name in names:
        assert f'_private("{name}")' in source
        assert private_torch._private(name) is not None, name
    assert source.count('_private("') == len(names) + 3  # one occurs twice, one three times
    assert private_torch._private("ops.mkldnn._no_such_thing") is None


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_linear_with_a_weight_laid_out_for_other_rows(rows: int) -> None:
    inputs, weight, bias = numbers(rows, 20), numbers(37, 20, seed=1), numbers(37, seed=2)
    laid_out = private_torch.lay_out_linear_weight(weight, 16)
    result = private_torch.laid_out_linear(inputs, laid_out, bias)
    torch.testing.assert_close(result, functional.linear(inputs, weight, bias))


@pytest.mark.parametrize("biased", [False, True])
def test_linear(biased: bool) -> None:
    inputs, weight, bias = numbers(70, 33), numbers(33, 50, seed=1), numbers(50, seed=2)
    expected = inputs @ weight + (bias if biased else 0)
    found = private_torch.linear(inputs, weight, bias if biased else None)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


ACTIVATIONS: dict[str, tuple[list[float], Callable[[Tensor], Tensor]]] = {
    "none": ([], lambda x: x),
    "relu": ([], torch.relu),
    "hardtanh": ([0.0, 6.0], functional.relu6),
    "hardswish": ([], functional.hardswish),
    "swish": ([], functional.silu),
    "sigmoid": ([], torch.sigmoid),
}


@pytest.mark.parametrize(
    ("activation", "groups", "biased"), list(product(ACTIVATIONS, (1, 4), (False, True)))
)
def test_convolution(activation: str, groups: int, biased: bool) -> None:
    parameters, apply = ACTIVATIONS[activation]
    x = numbers(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    weight, bias = numbers(16, 8 // groups, 3, 3, seed=1), numbers(16, seed=2) if biased else None
    geometry = ([1, 1], [2, 2], [1, 1], groups)
    laid_out = private_torch.lay_out_convolution_weight(weight, geometry, [4, 8, 9, 9])
    found = private_torch.convolution(x, laid_out, bias, geometry, activation, parameters)
    expected = apply(functional.conv2d(x, weight, bias, 2, 1, 1, groups))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("activation", "in_place"), list(product(("none", "relu"), (False, True))))
def test_convolution_with_a_sum(activation: str, in_place: bool) -> None:
    x = numbers(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    other = numbers(2, 8, 9, 9, seed=3).contiguous(memory_format=torch.channels_last)
    weight, bias = numbers(8, 8, 1, 1, seed=1), numbers(8, seed=2)
    expected = ACTIVATIONS[activation][1](functional.conv2d(x, weight, bias) + other)
    geometry = ([0, 0], [1, 1], [1, 1], 1)
    laid_out = private_torch.lay_out_convolution_weight(weight, geometry, [2, 8, 9, 9])
    found = private_torch.convolution(
        x, laid_out, bias, geometry, activation, [], other, in_place=in_place
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["_reorder_convolution_weight", "_convolution_pointwise", "_convolution_pointwise_"]
)
@pytest.mark.parametrize("with_sum", [False, True])
def test_convolution_without_one_of_its_operations(
    name: str, with_sum: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "public":
        pytest.skip("runs without all of them")
    private = private_torch._private
    monkeypatch.setattr(
        private_torch, "_private", lambda n: None if n == f"ops.mkldnn.{name}" else private(n)
    )
    x = numbers(2, 8, 9, 9).contiguous(memory_format=torch.channels_last)
    other = numbers(2, 8, 9, 9, seed=3) if with_sum else None
    weight = numbers(8, 8, 1, 1, seed=1)
    geometry = ([0, 0], [1, 1], [1, 1], 1)
    expected = functional.conv2d(x, weight)
    expected = torch.relu(expected if other is None else expected + other)
    laid_out = private_torch.lay_out_convolution_weight(weight, geometry, [2, 8, 9, 9])
    found = private_torch.convolution(
        x, laid_out, None, geometry, "relu", [], other, in_place=with_sum
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("with_sum", [False, True])
def test_cudnn_convolution_on_a_gpu(with_sum: bool) -> None:
    check_cudnn_convolution(torch.device("cuda"), torch.float16, 1e-2, with_sum)


@pytest.mark.parametrize("with_sum", [False, True])
def test_cudnn_convolution_without_cudnn(with_sum: bool, way: str) -> None:
    if way == "private":
        pytest.skip("needs a CUDA device")
    check_cudnn_convolution(CPU, torch.float32, 1e-4, with_sum)


def check_cudnn_convolution(
    device: torch.device, dtype: torch.dtype, tolerance: float, with_sum: bool
) -> None:
    x, other = numbers(2, 16, 9, 9), numbers(2, 16, 9, 9, seed=3)
    weight, bias = numbers(16, 16, 3, 3, seed=1) / 12, numbers(16, seed=2)
    added = functional.conv2d(x, weight, bias, 1, 1) + (other if with_sum else 0)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype, memory_format=torch.channels_last)

    found = private_torch.cudnn_convolution(
        moved(x),
        moved(weight),
        bias.to(device, dtype),
        ([1, 1], [1, 1], [1, 1], 1),
        moved(other) if with_sum else None,
    )
    expected = torch.relu(added)
    torch.testing.assert_close(found.float().cpu(), expected, rtol=tolerance, atol=tolerance)


def test_resize_into_writes_what_interpolate_returns() -> None:
    photo = (numbers(1, 3, 40, 50) * 50 + 128).clamp(0, 255).to(torch.uint8)
    photo = photo.contiguous(memory_format=torch.channels_last)
    out = torch.empty(2, 3, 16, 16, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    private_torch.resize_into(photo, out[1:])
    expected = functional.interpolate(photo, (16, 16), mode="bilinear", antialias=True)
    assert torch.equal(out[1:], expected)


def test_bfloat16_convolutions_are_not_used_unasked(way: str) -> None:
    if way == "public":
        assert not private_torch.has_bfloat16_convolutions()
    elif has_fast_bfloat16():
        assert private_torch.has_bfloat16_convolutions()


def test_gradients_of_tanh_and_sigmoid() -> None:
    x, gradient = numbers(5, 6).requires_grad_(), numbers(5, 6, seed=1)
    for function, backward in (
        (torch.tanh, private_torch.tanh_backward_),
        (torch.sigmoid, private_torch.sigmoid_backward_),
    ):
        result = function(x)
        (expected,) = torch.autograd.grad(result, x, gradient)
        written = gradient.clone()
        assert backward(written, result.detach()) is written
        torch.testing.assert_close(written, expected)


@pytest.mark.parametrize("measure", [True, False])
def test_batch_norm_and_its_gradients(measure: bool) -> None:
    module, x = nn.BatchNorm1d(6), (numbers(9, 6) * 3 + 1).requires_grad_()
    with torch.no_grad():
        module.weight.copy_(numbers(6, seed=1))
        module.bias.copy_(numbers(6, seed=2))
        module.running_mean.copy_(numbers(6, seed=3))  # type: ignore[union-attr]
    twin = nn.BatchNorm1d(6)
    twin.load_state_dict(module.state_dict())
    gradient = numbers(9, 6, seed=4)
    expected = twin.train(measure)(x)
    wanted = torch.autograd.grad(expected, (x, twin.weight, twin.bias), gradient)
    with torch.no_grad():
        found, mean, inverse = private_torch.batch_norm(x.detach(), module, measure)
        gradients = private_torch.batch_norm_backward(
            gradient, x.detach(), module, mean, inverse, measure
        )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, wanted)
    torch.testing.assert_close(module.running_mean, twin.running_mean)
    torch.testing.assert_close(module.running_var, twin.running_var)


@pytest.mark.parametrize("fused", [False, True])
def test_the_equations_of_an_lstm_cell(fused: bool, way: str) -> None:
    if fused and way == "private":
        pytest.skip("the fused cell needs a CUDA device")
    check_lstm_cell(CPU, fused=fused)


@pytest.mark.gpu
def test_the_fused_lstm_cell_on_a_gpu() -> None:
    check_lstm_cell(torch.device("cuda"), fused=True)


def check_lstm_cell(device: torch.device, *, fused: bool) -> None:
    """Against `nn.LSTMCell` under autograd."""
    cell = nn.LSTMCell(5, 4).to(device)
    x, hidden = numbers(3, 5).to(device), numbers(3, 4, seed=1).to(device)
    before = numbers(3, 4, seed=2).to(device).requires_grad_()
    gates = (x @ cell.weight_ih.t()).detach().requires_grad_()
    recurrent = (hidden @ cell.weight_hh.t()).detach()
    i, f, g, o = (gates + recurrent + cell.bias_ih + cell.bias_hh).chunk(4, 1)
    cells = i.sigmoid() * g.tanh() + f.sigmoid() * before
    outputs = o.sigmoid() * cells.tanh()
    expected_outputs, expected_cells = cell(x, (hidden, before))
    torch.testing.assert_close((outputs, cells), (expected_outputs, expected_cells))
    d_outputs, d_cells = numbers(3, 4, seed=3).to(device), numbers(3, 4, seed=4).to(device)
    wanted = torch.autograd.grad(
        (outputs, cells), (gates, before), (d_outputs, d_cells), retain_graph=True
    )
    wanted_of_outputs = torch.autograd.grad(outputs, (gates, before), d_outputs)
    with torch.no_grad():
        biases = cell.bias_ih.detach(), cell.bias_hh.detach()
        found_outputs, found_cells, activated = private_torch.lstm_cell(
            gates.detach(), recurrent, before.detach(), biases, fused=fused
        )
        gradients = private_torch.lstm_cell_backward(
            d_outputs, d_cells, before.detach(), found_cells, activated, fused=fused
        )
        gradients_of_outputs = private_torch.lstm_cell_backward(
            d_outputs, None, before.detach(), found_cells, activated, fused=fused
        )
    torch.testing.assert_close((found_outputs, found_cells), (outputs, cells))
    torch.testing.assert_close(gradients, wanted)
    torch.testing.assert_close(gradients_of_outputs, wanted_of_outputs)


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_adamw_is_torchs(decay: float) -> None:
    start, rate = numbers(32), 0.01
    parameter = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], lr=rate, weight_decay=decay)
    values, moments = start.clone(), (torch.zeros(32), torch.zeros(32))
    for step in range(1, 4):
        gradient = numbers(32, seed=step)
        parameter.grad = gradient.clone()
        optimizer.step()
        private_torch.adamw_(
            values,
            gradient * 7,
            moments,
            torch.tensor(float(step)),
            torch.tensor(rate),
            torch.tensor(7.0),
            betas=(0.9, 0.999),
            decay=decay,
            eps=1e-8,
        )
    torch.testing.assert_close(values, parameter.detach())


def test_a_version_tells_that_a_tensor_was_written_to(way: str) -> None:
    tensor = torch.zeros(4)
    before = private_torch.version(tensor)
    assert (private_torch.version(tensor) == before) == (way == "private")
    tensor[:2].fill_(1)
    assert private_torch.version(tensor) != before


def test_copy_all() -> None:
    targets, sources = [torch.zeros(3), torch.zeros(2, 2)], [numbers(3), numbers(2, 2, seed=1)]
    private_torch.copy_all_(targets, sources)
    torch.testing.assert_close(targets, sources)


def test_copy_module() -> None:
    shared = nn.Linear(2, 2)
    module = nn.Sequential(nn.BatchNorm1d(2), shared, nn.Sequential(shared, nn.ReLU())).eval()
    module.register_buffer("absent", None)
    tensors = {id(t): t + 1 for t in (*module.parameters(), *module.buffers())}
    tensors = {key: nn.Parameter(t) if t.is_floating_point() else t for key, t in tensors.items()}
    copied = private_torch.copy_module(module, tensors)
    assert [type(part) for part in copied.modules()] == [type(part) for part in module.modules()]
    assert copied.get_submodule("1") is copied.get_submodule("2.0") is not shared
    old, new = module.state_dict(), copied.state_dict()
    assert list(old) == list(new)
    assert all(torch.equal(new[key], old[key] + 1) for key in old)
    assert not any(part.training for part in copied.modules())
    copied.set_submodule("2.1", nn.Identity())
    copied.train()
    assert isinstance(module.get_submodule("2.1"), nn.ReLU)
    assert not module.training
