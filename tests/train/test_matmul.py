"""Products into existing memory give the same numbers by every library."""

from __future__ import annotations

import pytest
import torch

from train.step.cpu import matmul
from train.step.cpu.matmul import add_product_, multiply


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_CHUNK_BYTES", 4 * 32 * 64)  # 64 rows of 32 columns


@pytest.mark.parametrize("rows", [1, 64, 65, 200])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("small_chunks")
def test_products_of_any_height_and_layout_agree_with_float64(rows: int, transposed: bool) -> None:
    torch.manual_seed(0)
    left = torch.randn(16, rows).t() if transposed else torch.randn(rows, 16)
    right = torch.randn(32, 16).t() if transposed else torch.randn(16, 32)
    bias, out = torch.randn(32), torch.randn(rows, 32)
    expected = (left.double() @ right.double()).float()

    assert multiply(left, right, torch.empty(rows, 32)).allclose(expected, atol=1e-5)
    assert multiply(left, right, torch.empty(rows, 32), bias).allclose(expected + bias, atol=1e-5)
    assert add_product_(out.clone(), left, right).allclose(out + expected, atol=1e-5)


@pytest.mark.usefixtures("small_chunks")
def test_a_product_is_written_into_a_part_of_a_larger_buffer() -> None:
    torch.manual_seed(0)
    left, right, buffer = torch.randn(100, 16), torch.randn(16, 32), torch.zeros(300, 32)
    multiply(left, right, buffer[100:200])
    assert buffer[100:200].allclose(left @ right, atol=1e-5)
    assert not buffer[:100].any()
    assert not buffer[200:].any()


def test_without_onednn_the_products_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    left, right, bias = torch.randn(80, 16), torch.randn(16, 32), torch.randn(32)
    by_onednn = multiply(left, right, torch.empty(80, 32), bias)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert multiply(left, right, torch.empty(80, 32), bias).allclose(by_onednn, atol=1e-5)


def test_bfloat16_products_stay_in_bfloat16() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(80, 16).bfloat16(), torch.randn(16, 32).bfloat16()
    out = torch.empty(80, 32, dtype=torch.bfloat16)
    assert multiply(left, right, out) is out
    assert out.float().allclose(left.float() @ right.float(), rtol=1e-2, atol=1e-1)
