"""The recurrence of one LSTM layer on a CPU, forward and backward, one step after the other.

Equations as in Hochreiter & Schmidhuber (1997) with forget gates; gate order i, f, g, o. The rows
of a step continue the first rows of the step before (`train.step.packed_batch`). Sizes: R rows, H
the LSTM's. The "products' dtype" is float32 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train import private_torch
from train.step.buffers import Buffers
from train.step.cpu.matmul import add_product_, multiply


@dataclass(frozen=True)
class LstmStates:
    """The results of the forward pass that the backward pass needs."""

    gates: Tensor  # (R, 4H) float32: i, f, g, o
    cells: Tensor  # (R, H) float32
    tanh_cells: Tensor  # (R, H) float32
    outputs: Tensor  # (R, H) in the products' dtype


def lstm_forward(
    layer: int, gate_sums: Tensor, recurrent_weight: Tensor, steps: Sequence[int], buffers: Buffers
) -> LstmStates:
    """Run a layer through all steps.

    layer: its number, which keeps its buffers apart. gate_sums: (R, 4H) in the products' dtype, the
    inputs' part with both biases; the hidden state's part is added in place. recurrent_weight:
    (H, 4H). steps: the number of rows of each step; rows past the last step get outputs of zero.
    """
    rows, size = len(gate_sums), gate_sums.shape[1] // 4
    gates = buffers.float(f"gates{layer}", rows, 4 * size)
    cells = buffers.float(f"cells{layer}", rows, size)
    tanh_cells = buffers.float(f"tanh_cells{layer}", rows, size)
    outputs = buffers.low(f"outputs{layer}", rows, size)
    start = previous_start = 0
    for t, count in enumerate(steps):
        current = slice(start, start + count)
        previous = slice(previous_start, previous_start + count)
        if t > 0:
            add_product_(gate_sums[current], outputs[previous], recurrent_weight)
        step_gates = gates[current]
        step_gates.copy_(gate_sums[current])
        i, f, g, o = step_gates.split(size, 1)
        _activate_gates_(step_gates, g)
        cell, tanh_cell = cells[current], tanh_cells[current]
        torch.mul(i, g, out=cell)
        if t > 0:
            cell.addcmul_(f, cells[previous])
        _tanh(cell, tanh_cell)
        outputs[current].copy_(o * tanh_cell)
        previous_start, start = start, start + count
    outputs[start:].zero_()
    return LstmStates(gates, cells, tanh_cells, outputs)


def lstm_backward(
    states: LstmStates,
    recurrent_weight: Tensor,
    steps: Sequence[int],
    d_outputs: Tensor,
    buffers: Buffers,
) -> Tensor:
    """The gradient of the sums that enter the gates: (R, 4H) in the products' dtype, zero in rows
    past the last step.

    recurrent_weight: (H, 4H). d_outputs: (R, H), the gradient of the outputs.
    """
    rows, size = d_outputs.shape
    recurrent_weight = recurrent_weight.t()  # (4H, H)
    d_hidden = buffers.float("d_hidden", rows, size)
    d_hidden.copy_(d_outputs)
    d_gate_sums = buffers.low("d_gate_sums", rows, 4 * size)
    d_step_gates = buffers.float("d_step_gates", steps[0], 4 * size)
    d_step_cells = buffers.float("d_step_cells", steps[0], size).zero_()
    through_output_gate = buffers.float("through_output_gate", steps[0], size)
    d_previous = buffers.low("d_previous", steps[0], size)
    start = sum(steps)
    d_gate_sums[start:].zero_()
    for t in reversed(range(len(steps))):
        count = steps[t]
        start -= count
        current = slice(start, start + count)
        previous = slice(start - steps[t - 1], start - steps[t - 1] + count) if t else None
        i, f, g, o = states.gates[current].split(size, 1)
        tanh_cell, d_output = states.tanh_cells[current], d_hidden[current]
        d_cell, d_gates = d_step_cells[:count], d_step_gates[:count]
        d_i, d_f, d_g, d_o = d_gates.split(size, 1)
        d_tanh_cell = torch.mul(d_output, o, out=through_output_gate[:count])
        d_cell.add_(private_torch.tanh_backward_(d_tanh_cell, tanh_cell))
        torch.mul(d_output, tanh_cell, out=d_o)
        torch.mul(d_cell, g, out=d_i)
        torch.mul(d_cell, i, out=d_g)
        if previous is None:
            d_f.zero_()
        else:
            torch.mul(d_cell, states.cells[previous], out=d_f)
        private_torch.sigmoid_backward_(d_o, o)
        private_torch.sigmoid_backward_(
            d_gates[:, : 2 * size], states.gates[current][:, : 2 * size]
        )
        private_torch.tanh_backward_(d_g, g)
        d_gate_sums[current].copy_(d_gates)
        if previous is not None:
            d_cell.mul_(f)
            d_hidden[previous].add_(
                multiply(d_gate_sums[current], recurrent_weight, d_previous[:count])
            )
    return d_gate_sums


def _activate_gates_(gates: Tensor, g: Tensor) -> None:
    """Apply sigmoid to i, f and o and tanh to g, in place. g: its part of the gates.

    On a CPU one sigmoid over all gates is three times as fast as torch's tanh over a quarter.
    """
    g.mul_(2)
    gates.sigmoid_()
    g.mul_(2).sub_(1)


def _tanh(values: Tensor, out: Tensor) -> None:
    torch.mul(values, 2, out=out)
    out.sigmoid_().mul_(2).sub_(1)
