"""The loss and gradients of `train.step.cpu.objective`, for a GPU, in as few kernels as possible.

A GPU starts a small kernel in the time in which it could read a million numbers. Therefore all
captions of a batch have the same number of rows, so that all shapes follow from the number of
captions and the longest one's length (`pack` without `round_up`), and each task between the
products is one kernel (`train.step.kernels`). Nothing waits for the device, so a step can be
captured as a graph.

Products read bfloat16 where the device multiplies it fast, and sum in float32. Gates, cell states
and the gradients of all parameters are kept in float32; products write them where they are needed.
The small products of the recurrence leave most of a GPU idle. In the backward pass the large
products whose results nothing waits for run beside them, on a stream of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from train import private_torch
from train.model.decoder import CaptionDecoder
from train.model.flat_parameters import FlatParameters
from train.step.buffers import Buffers
from train.step.cuda.kernel_choice import kernels_for
from train.step.dropout import NO_MASKS, Masks
from train.step.kernels import Kernels
from train.step.logits import rule_out_undrawn_words
from train.step.packed_batch import PackedBatch, of_all_photos


class CudaObjective:
    """Computes `decoder.loss` and its gradients into `parameters.gradients`, like `CpuObjective`.

    Needs parameters laid out as (out, in) and batches packed without rounding. kernels: None means
    those that `kernels_for` chooses for the device.
    """

    def __init__(
        self,
        decoder: CaptionDecoder,
        parameters: FlatParameters,
        *,
        dtype: torch.dtype,
        label_smoothing: float = 0.0,
        kernels: Kernels | None = None,
    ) -> None:
        self.decoder = decoder
        self.parameters = parameters
        self.dtype = dtype
        self.label_smoothing = label_smoothing
        self.config = decoder.config
        device = parameters.values.device
        self.kernels = kernels_for(device, dtype) if kernels is None else kernels
        self._head = "embed.weight" if self.config.tie_embeddings else "head.weight"
        # The parameters in the products' dtype. Unless that is float32 this is a copy, `low`, which
        # the optimizer writes together with the parameters.
        self._product_values = parameters.values
        self.low: Tensor | None = None
        if dtype is not torch.float32:
            self._product_values = self.low = torch.empty_like(parameters.values, dtype=dtype)
        self._converted = -1  # the version of the parameters that `low` was converted from
        # Captured steps hold the addresses of the training buffers. Validation has its own, so that
        # it never moves them.
        self._training = Buffers(dtype, device)
        self._evaluation = Buffers(dtype, device)
        self._device = device
        self._side_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def generation(self) -> int:
        """Changes when a training buffer moves."""
        return self._training.generation

    def reserve(self, captions: int, length: int) -> None:
        """Announce the largest training batch: its number of captions and the most targets of one.

        Training buffers are then allocated at their full size and need not move.
        """
        self._training.reserve(captions, captions * length)

    @torch.no_grad()
    def refresh(self) -> None:
        """Convert the parameters to `low` if anything but the optimizer's kernel has changed them.

        Call this before replaying a captured step, which does not convert them itself.
        """
        values = self.parameters.values
        if self.low is not None and private_torch.version(values) != self._converted:
            self.low.copy_(values)
            self._converted = private_torch.version(values)

    @torch.no_grad()
    def loss(self, batch: PackedBatch) -> Tensor:
        """Mean cross-entropy per target token, a float32 scalar, without dropout or smoothing."""
        buffers = self._evaluation
        states = self._hidden(batch, NO_MASKS, buffers, training=False)
        logits = self._logits(states.before_head, buffers)
        return self._cross_entropy(batch, logits, None, 0.0, buffers) / batch.count()

    @torch.no_grad()
    def loss_and_gradients(
        self,
        batch: PackedBatch,
        masks: Masks = NO_MASKS,
        *,
        weights: Tensor | None = None,
        training: bool = True,
        drawn: bool = False,
    ) -> Tensor:
        """As `CpuObjective.loss_and_gradients`."""
        buffers = self._training
        states = self._hidden(batch, masks, buffers, training=training)
        logits = self._logits(states.before_head, buffers)
        smoothing = 0.0 if drawn else self.label_smoothing
        if drawn:
            rule_out_undrawn_words(logits, batch.steps[0])
        loss = self._cross_entropy(batch, logits, weights, smoothing, buffers)
        self._backward(batch, masks, states, logits)
        return loss

    def _value(self, name: str) -> Tensor:
        return self.parameters.memory(name, self.parameters.values)  # float32

    def _gradient(self, name: str) -> Tensor:
        return self.parameters.memory(name, self.parameters.gradients)

    def _weight(self, name: str) -> Tensor:
        return self.parameters.memory(name, self._product_values)  # (out, in)

    def _hidden(
        self, batch: PackedBatch, masks: Masks, buffers: Buffers, *, training: bool
    ) -> _States:
        """The forward pass up to the head."""
        rows, captions, config = len(batch.words), batch.size, self.config
        assert rows == captions * len(batch.steps)
        self.refresh()
        photo = self._read_photo(batch, masks, training)
        inputs = buffers.low("inputs", rows, config.embedding_size)
        self.kernels.read_inputs(
            batch.words, self._value("embed.weight"), photo.normalized, masks.inputs, inputs,
            photo_every_step=config.photo_every_step,
        )  # fmt: skip
        layers: list[_Layer] = []
        outputs = inputs
        for n in range(config.num_layers):
            mask = masks.layers[n] if masks.layers else None
            layers.append(self._lstm_forward(n, captions, outputs, mask, buffers))
            outputs = layers[-1].dropped
        before_head = outputs
        if config.tie_embeddings:
            before_head = buffers.low("transformed", rows, config.embedding_size)
            torch.addmm(
                self._weight("transform.bias"),
                outputs,
                self._weight("transform.weight").t(),
                out=before_head,
            )
        return _States(photo, layers, outputs, before_head)

    def _logits(self, before_head: Tensor, buffers: Buffers) -> Tensor:
        """(R, padded W)."""
        logits = buffers.low("logits", len(before_head), self.parameters.padded_words)
        return torch.addmm(
            self._weight("head.bias"), before_head, self._weight(self._head).t(), out=logits
        )

    def _read_photo(self, batch: PackedBatch, masks: Masks, training: bool) -> _Photo:
        normalize = self.decoder.normalize
        # BatchNorm cannot measure one row.
        measure = training and len(batch.features) > 1
        features = batch.features.to(self.dtype)
        if masks.features is not None:
            features = features * masks.features
        weight = self._weight("project.weight")
        projected = torch.empty(len(features), len(weight), device=features.device)
        self.kernels.product(features, weight.t(), projected)
        projected.add_(self._value("project.bias"))
        normalized, mean, inverse_std = private_torch.batch_norm(projected, normalize, measure)
        if measure and normalize.num_batches_tracked is not None:
            normalize.num_batches_tracked.add_(1)
        if batch.share is not None:
            normalized = normalized[batch.share]
        return _Photo(features, projected, normalized.contiguous(), mean, inverse_std, measure)

    def _lstm_forward(
        self, n: int, captions: int, inputs: Tensor, mask: Tensor | None, buffers: Buffers
    ) -> _Layer:
        rows, size = len(inputs), self.config.hidden_size
        gates = buffers.float(f"gates{n}", rows, 4 * size)
        self.kernels.product(inputs, self._weight(f"lstm.weight_ih_l{n}").t(), gates)
        weight = self._weight(f"lstm.weight_hh_l{n}").t()
        biases = (self._value(f"lstm.bias_ih_l{n}"), self._value(f"lstm.bias_hh_l{n}"))
        cells = buffers.float(f"cells{n}", rows, size)
        outputs = buffers.low(f"outputs{n}", rows, size)
        dropped = outputs if mask is None else buffers.low(f"dropped{n}", rows, size)
        recurrent = buffers.float("recurrent", captions, 4 * size)
        for start in range(0, rows, captions):
            current = slice(start, start + captions)
            previous = slice(start - captions, start)
            if start:
                self.kernels.product(outputs[previous], weight, recurrent)
            self.kernels.cell_forward(
                gates[current],
                recurrent if start else None,
                biases,
                cells[previous] if start else None,
                None if mask is None else mask[current],
                cells[current],
                outputs[current],
                dropped[current],
            )
        return _Layer(inputs, gates, cells, outputs, dropped)

    def _cross_entropy(
        self,
        batch: PackedBatch,
        logits: Tensor,
        weights: Tensor | None,
        smoothing: float,
        buffers: Buffers,
    ) -> Tensor:
        """The sum of the losses. The logits become their gradients."""
        losses = buffers.float("losses", len(logits))
        self.kernels.cross_entropy(
            logits,
            batch.targets,
            weights,
            losses,
            words=self.config.vocab_size,
            smoothing=smoothing,
        )
        return losses.sum()

    def _backward(
        self, batch: PackedBatch, masks: Masks, states: _States, d_logits: Tensor
    ) -> None:
        d_outputs = self._linear_backward(self._head, "head.bias", states.before_head, d_logits)
        if self.config.tie_embeddings:
            d_outputs = self._linear_backward(
                "transform.weight", "transform.bias", states.outputs, d_outputs
            )
        captions = batch.size
        for n in reversed(range(1, self.config.num_layers)):
            d_gates = self._lstm_backward(n, captions, masks, states, d_outputs)
            d_outputs = torch.mm(
                d_gates,
                self._weight(f"lstm.weight_ih_l{n}"),
                out=self._training.low("d_between", len(d_gates), self.config.hidden_size),
            )
        d_gates = self._lstm_backward(0, captions, masks, states, d_outputs)
        d_inputs = self._training.float("d_inputs", len(d_gates), self.config.embedding_size)
        self.kernels.product(d_gates, self._weight("lstm.weight_ih_l0"), d_inputs)
        if masks.inputs is not None:
            d_inputs.mul_(masks.inputs)
        embedding = self._gradient("embed.weight")
        if self.config.tie_embeddings:
            self._wait_for_side_stream()  # the words' gradients are added to the head's
        else:
            embedding.zero_()
        embedding.index_add_(0, batch.words[captions:], d_inputs[captions:])
        d_photo = d_inputs[:captions]
        if self.config.photo_every_step:
            d_photo = d_inputs.view(-1, captions, self.config.embedding_size).sum(0)
        self._photo_backward(states.photo, of_all_photos(batch, d_photo))
        self._wait_for_side_stream()

    @contextlib.contextmanager
    def _on_side_stream(self) -> Iterator[None]:
        """Queue work on the side stream, behind everything queued on the main stream so far.

        The tensors of this work must not change before `_wait_for_side_stream`.
        """
        if self._side_stream is None:
            yield
            return
        self._side_stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side_stream):
            yield

    def _wait_for_side_stream(self) -> None:
        """Let the main stream wait; the host does not."""
        if self._side_stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side_stream)

    def _linear_backward(self, weight: str, bias: str, inputs: Tensor, d_outputs: Tensor) -> Tensor:
        """Store the gradients of `weight` and `bias` in `inputs @ weight.t() + bias`, and return
        that of `inputs`.
        """
        with self._on_side_stream():
            self.kernels.product(d_outputs.t(), inputs, self._gradient(weight))
            self._sum_rows(d_outputs, bias)
        d_inputs = self._training.low(f"d {weight}", *inputs.shape)
        return torch.mm(d_outputs, self._weight(weight), out=d_inputs)

    def _sum_rows(self, d_outputs: Tensor, bias: str) -> None:
        """Store the gradient of a bias that was added to every row."""
        torch.sum(d_outputs, 0, dtype=torch.float32, out=self._gradient(bias))

    def _lstm_backward(
        self, n: int, captions: int, masks: Masks, states: _States, d_outputs: Tensor
    ) -> Tensor:
        """Store the gradients of a layer's parameters, and return that of the sums that enter its
        gates, (R, 4H).
        """
        layer, buffers = states.layers[n], self._training
        rows, size = d_outputs.shape
        mask = masks.layers[n] if masks.layers else None
        weight = self._weight(f"lstm.weight_hh_l{n}")
        d_gates = buffers.low(f"d_gates{n}", rows, 4 * size)
        d_cells = buffers.float("d_cells", captions, size)
        d_recurrent = buffers.float("d_recurrent", captions, size)
        for start in reversed(range(0, rows, captions)):
            current = slice(start, start + captions)
            previous = slice(start - captions, start)
            following = slice(start + captions, start + 2 * captions)
            is_last = start + captions == rows
            if not is_last:
                self.kernels.product(d_gates[following], weight, d_recurrent)
            self.kernels.cell_backward(
                d_outputs[current],
                None if mask is None else mask[current],
                None if is_last else d_recurrent,
                d_cells,
                layer.gates[current],
                layer.cells[current],
                layer.cells[previous] if start else None,
                d_gates[current],
            )
        with self._on_side_stream():
            self.kernels.product(d_gates.t(), layer.inputs, self._gradient(f"lstm.weight_ih_l{n}"))
            d_weight = self._gradient(f"lstm.weight_hh_l{n}")
            if rows > captions:
                self.kernels.product(d_gates[captions:].t(), layer.outputs[:-captions], d_weight)
            else:
                d_weight.zero_()
            self._sum_rows(d_gates, f"lstm.bias_ih_l{n}")
            self._gradient(f"lstm.bias_hh_l{n}").copy_(self._gradient(f"lstm.bias_ih_l{n}"))
        return d_gates

    def _photo_backward(self, photo: _Photo, d_photo: Tensor) -> None:
        normalize = self.decoder.normalize
        d_projected, d_scale, d_shift = private_torch.batch_norm_backward(
            d_photo, photo.projected, normalize, photo.mean, photo.inverse_std, photo.measured
        )
        private_torch.copy_all_(
            [self._gradient("normalize.weight"), self._gradient("normalize.bias")],
            [d_scale, d_shift],
        )
        self._sum_rows(d_projected, "project.bias")
        self.kernels.product(
            d_projected.to(self.dtype).t(), photo.features, self._gradient("project.weight")
        )


@dataclass(frozen=True)
class _Photo:
    # With a share, the first two are of the whole batch.
    features: Tensor  # (B, D), after the mask, in the products' dtype
    projected: Tensor  # (B, E) float32
    normalized: Tensor  # (B, E) float32
    mean: Tensor
    inverse_std: Tensor
    measured: bool  # BatchNorm used the batch's own statistics


@dataclass(frozen=True)
class _Layer:
    inputs: Tensor  # (R, in)
    gates: Tensor  # (R, 4H) float32: i, f, g, o
    cells: Tensor  # (R, H) float32
    outputs: Tensor  # (R, H)
    dropped: Tensor  # (R, H): the outputs after dropout


@dataclass(frozen=True)
class _States:
    photo: _Photo
    layers: list[_Layer]
    outputs: Tensor  # (R, H) of the last layer, after dropout
    before_head: Tensor  # (R, H), or (R, E) with tied embeddings
