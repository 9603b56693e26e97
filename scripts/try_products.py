"""Try every way that PyTorch has to compute the matrix products of a training step on this CPU.

    python scripts/try_products.py [--dtype bfloat16] [--threads 2]

The sizes are those of a step of the classic recipe: 128 captions of COCO, 1,664 rows with the
photo, 256-d embedding, 512-d LSTM, 9,984 words (9,952, rounded up to a multiple of 64). For each
product all ways take turns, and the best time of each counts. `now` marks the way that training
takes. The last column is the share of the fastest product of all, the one number that does not
depend on what else the machine does. Meant for processors with matrix units (Intel's AMX), on which
PyTorch's own choice was measured at a quarter of what the products could take.

The ways are: `mm` PyTorch's product with `out`; `linear` its fresh result; `onednn` oneDNN's
product of a plain weight, and `packed` of a weight in oneDNN's own layout, whose conversion a step
would pay once for each weight (in brackets); `mm/416` and the like the same in parts of so many
rows. Then the recurrence of a layer, step by step as in training, and as oneDNN's own LSTM and
PyTorch's `nn.LSTM`, both over the padded captions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from train.step.buffers import Buffers
from train.step.cpu.lstm import lstm_forward
from train.step.cpu.matmul import multiply
from train.torch_import import spin_briefly

_CAPTIONS, _EMBEDDING, _HIDDEN, _WORDS, _FEATURES = 128, 256, 512, 9_984, 2_048
# Captions that have not ended at each step: the photo, then words as long as COCO's captions are.
_STEPS = (128, 128, 128, 128, 128, 128, 128, 128, 128, 128, 112, 80, 48, 32, 32, 16, 16, 16, 16, 16)
_PARTS = (416, 832)
_PACKING = "(packing)"

# (name, rows, inner, columns): rows × inner @ inner × columns
_ROWS = sum(_STEPS) + -sum(_STEPS) % 64
_PRODUCTS = (
    ("gates of the inputs", _ROWS, _EMBEDDING, 4 * _HIDDEN),
    ("one step's recurrence", _CAPTIONS, _HIDDEN, 4 * _HIDDEN),
    ("logits", _ROWS, _HIDDEN, _WORDS),
    ("gradient of the head's inputs", _ROWS, _WORDS, _HIDDEN),
    ("gradient of the head's weight", _HIDDEN, _ROWS, _WORDS),
    ("gradient of the gates' inputs", _ROWS, 4 * _HIDDEN, _EMBEDDING),
    ("gradient of the gates' weight", _HIDDEN, _ROWS, 4 * _HIDDEN),
    ("projection", _CAPTIONS, _FEATURES, _EMBEDDING),
)


def main(
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.")] = None,
    turns: Annotated[int, typer.Option(min=1, help="Measurements of each way.")] = 15,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    print(
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__}, {dtype}; milliseconds, the best of {turns}"
    )
    times = {name: _product_times(m, k, n, kind, turns) for name, m, k, n in _PRODUCTS}
    flop = {name: 2.0 * m * k * n for name, m, k, n in _PRODUCTS}
    best_rate = max(
        flop[name] / ms
        for name, found in times.items()
        for way, ms in found.items()
        if way != _PACKING
    )
    for name, m, k, n in _PRODUCTS:
        print(f"\n{name}: {m:,} × {k:,} @ {k:,} × {n:,}, {flop[name] / 1e9:.1f} GFLOP")
        for way, ms in sorted(times[name].items(), key=lambda item: item[1]):
            rate, share = flop[name] / ms / 1e6, flop[name] / ms / best_rate
            speed = "" if way == _PACKING else f"{rate:>9.0f} GFLOP/s{share:>7.0%}"
            print(f"  {way:<16}{ms:>9.2f} ms{speed}")
    print(f"\nrecurrence of a layer, forward, {len(_STEPS)} steps, {sum(_STEPS):,} rows")
    for way, ms in sorted(_recurrence_times(kind, turns).items(), key=lambda item: item[1]):
        print(f"  {way:<28}{ms:>9.2f} ms")


@torch.inference_mode()
def _product_times(
    rows: int, inner: int, columns: int, dtype: torch.dtype, turns: int
) -> dict[str, float]:
    """The milliseconds of each way, the conversion of a packed weight among them."""
    left = torch.randn(rows, inner).to(dtype)
    right = torch.randn(inner, columns).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype)
    ways: dict[str, Callable[[], object]] = {
        "mm": lambda: torch.mm(left, right, out=out),
        "linear": lambda: nn.functional.linear(left, right.t()),
        "now": lambda: multiply(left, right, out),
    }
    if _has(dtype):
        packed = torch.ops.mkldnn._reorder_linear_weight(right.t().contiguous(), rows)
        ways |= {
            "onednn": lambda: _onednn(left, right.t()),
            "packed": lambda: _onednn(left, packed),
            _PACKING: lambda: torch.ops.mkldnn._reorder_linear_weight(right.t().contiguous(), rows),
        }
    for part in _PARTS:
        if part < rows:
            slices = [slice(start, start + part) for start in range(0, rows, part)]
            ways[f"mm/{part}"] = _in_parts(slices, lambda p: torch.mm(left[p], right, out=out[p]))
            if _has(dtype):
                ways[f"packed/{part}"] = _in_parts(
                    slices, lambda p: out[p].copy_(_onednn(left[p], packed))
                )
    exact = left.float() @ right.float()
    for name, way in ways.items():  # a way that computes something else is no way
        result = way()
        if isinstance(result, Tensor) and result.shape == exact.shape:
            error = float((result.float() - exact).norm() / exact.norm())
            assert error < 0.02, f"{name} is wrong by {error:.1%}"
    return _best_times(ways, turns)


def _recurrence_times(dtype: torch.dtype, turns: int) -> dict[str, float]:
    gate_sums = torch.randn(_ROWS, 4 * _HIDDEN).to(dtype)
    weight = (torch.randn(_HIDDEN, 4 * _HIDDEN) / 30).to(dtype)
    buffers = Buffers(dtype, torch.device("cpu"))
    lstm = nn.LSTM(_EMBEDDING, _HIDDEN).to(dtype)
    padded = torch.randn(len(_STEPS), _CAPTIONS, _EMBEDDING).to(dtype)
    state = torch.zeros(1, _CAPTIONS, _HIDDEN, dtype=dtype)
    ways: dict[str, Callable[[], object]] = {
        "now, without the inputs' part": lambda: lstm_forward(
            0, gate_sums.clone(), weight, _STEPS, buffers
        ),
        "nn.LSTM": lambda: lstm(padded, (state, state)),
    }
    operation: Any = getattr(torch.ops.aten, "mkldnn_rnn_layer", None)
    if operation is not None and _has(dtype):
        weights = [parameter.detach() for parameter in lstm.parameters()]
        lstm_mode = 2  # at::native::MKLDNN_LSTM, as in cuDNN's numbering
        arguments: tuple[Any, ...] = (False, [], lstm_mode, _HIDDEN, 1, True, False, False)
        ways["oneDNN's LSTM"] = lambda: operation(
            padded, *weights, state[0], state[0], *arguments, False
        )
        ways["oneDNN's LSTM, for training"] = lambda: operation(
            padded, *weights, state[0], state[0], *arguments, True
        )
    usable = {}
    with torch.inference_mode():
        for name, way in ways.items():
            try:
                way()
                usable[name] = way
            except RuntimeError as error:
                print(f"  {name}: {str(error).splitlines()[0][:100]}")
        return _best_times(usable, turns)


def _has(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes in this precision here."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _onednn(left: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(left, weight, None, "none", [], "")
    return result


def _in_parts(parts: Sequence[slice], product: Callable[[slice], object]) -> Callable[[], None]:
    def run() -> None:
        for part in parts:
            product(part)

    return run


def _best_times(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """The best of several turns of each way, in milliseconds; all of them take turns."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(turns):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    spin_briefly()
    typer.run(main)
