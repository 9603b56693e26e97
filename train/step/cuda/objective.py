"""The loss and gradients of `train.step.cpu.objective`, for a GPU, in as few kernels as can be.

A GPU starts a small kernel in the time in which it could read a million numbers, so all captions
of a batch have as many rows, which depend on nothing but their number and the longest one's length
(`pack` without `round_up`), and between the products there is one kernel a task (`kernels`).
Nothing waits for the device, so that a step can be captured as a graph.

Products read bfloat16 where the device is fast at it and are summed in float32; gates, cell states
and the gradients of all parameters leave them in float32, and are written where they are needed.
The recurrence's small products leave most of a GPU idle: backward, the large ones that nothing
waits for run beside it, on a stream of their own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from train import private_torch
from train.captions.vocabulary import END
from train.model.decoder import CaptionDecoder
from train.model.flat_parameters import FlatParameters
from train.search.word_choice import NEVER
from train.step.cpu.objective import IMPOSSIBLE_LOGIT
from train.step.cuda.kernel_choice import kernels_for
from train.step.dropout import NO_MASKS, Masks
from train.step.kernels import Kernels
from train.step.packed_batch import PackedBatch


class CudaObjective:
    """Computes `decoder.loss` and its gradients into `parameters.gradients`, as `FastObjective`.

    Needs parameters laid out as (out, in) and batches packed without rounding. kernels: those of
    the device, unless given.
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
        # The parameters in the products' dtype, which the optimizer writes along with them.
        self._low = parameters.values
        self.low: Tensor | None = None  # the same, if another dtype than the parameters'
        if dtype is not torch.float32:
            self._low = self.low = torch.empty_like(parameters.values, dtype=dtype)
        self._converted = -1  # the version of the parameters that `low` holds
        # Captured steps point into their buffers: what validation needs must not move them.
        self._training = _Buffers(dtype, device)
        self._evaluation = _Buffers(dtype, device)
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def generation(self) -> int:
        """Changes when a buffer of training moves."""
        return self._training.generation

    def reserve(self, count: int, length: int) -> None:
        """Say that no batch of training will have more captions, or more targets in one: buffers
        are then made that large at once, and need not move.
        """
        self._training.count, self._training.rows = count, count * length

    @torch.no_grad()
    def refresh(self) -> None:
        """Convert the parameters if anything but the optimizer's kernel has changed them. To be
        called before a captured step, which does not.
        """
        values = self.parameters.values
        if self.low is not None and values._version != self._converted:
            self.low.copy_(values)
            self._converted = values._version

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
        """As `FastObjective.loss_and_gradients`."""
        buffers = self._training
        states = self._hidden(batch, masks, buffers, training=training)
        logits = self._logits(states.before_head, buffers)
        smoothing = 0.0 if drawn else self.label_smoothing
        if drawn:
            for word in NEVER:
                logits[:, word] = IMPOSSIBLE_LOGIT
            logits[: batch.steps[0], END] = IMPOSSIBLE_LOGIT
        loss = self._cross_entropy(batch, logits, weights, smoothing, buffers)
        self._backward(batch, masks, states, logits)
        return loss

    @torch.no_grad()
    def sample_words(self, batch: PackedBatch, rows: Tensor, uniform: Tensor) -> Tensor:
        """As `FastObjective.sample_words`."""
        buffers = self._evaluation
        before_head = self._hidden(batch, NO_MASKS, buffers, training=False).before_head[rows]
        logits = self._logits(before_head, buffers)
        below = logits.float().softmax(1).cumsum(1)  # (K, padded W)
        words = torch.searchsorted(below, uniform.unsqueeze(1) * below[:, -1:]).squeeze(1)
        return words.clamp_max(self.config.vocab_size - 1)

    def _value(self, name: str) -> Tensor:
        return self.parameters.memory(name, self.parameters.values)  # float32

    def _gradient(self, name: str) -> Tensor:
        return self.parameters.memory(name, self.parameters.gradients)

    def _weight(self, name: str) -> Tensor:
        return self.parameters.memory(name, self._low)  # (out, in)

    def _hidden(
        self, batch: PackedBatch, masks: Masks, buffers: _Buffers, *, training: bool
    ) -> _States:
        """Everything before the head."""
        rows, count, config = len(batch.words), len(batch.features), self.config
        assert rows == count * len(batch.steps)
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
            layers.append(self._lstm_forward(n, count, outputs, mask, buffers))
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

    def _logits(self, before_head: Tensor, buffers: _Buffers) -> Tensor:
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
        normalized, mean, inverse = private_torch.batch_norm(projected, normalize, measure)
        if measure and normalize.num_batches_tracked is not None:
            normalize.num_batches_tracked.add_(1)
        return _Photo(features, projected, normalized.contiguous(), mean, inverse, measure)

    def _lstm_forward(
        self, n: int, count: int, inputs: Tensor, mask: Tensor | None, buffers: _Buffers
    ) -> _Layer:
        rows, size = len(inputs), self.config.hidden_size
        gates = buffers.float(f"gates{n}", rows, 4 * size)
        self.kernels.product(inputs, self._weight(f"lstm.weight_ih_l{n}").t(), gates)
        weight = self._weight(f"lstm.weight_hh_l{n}").t()
        biases = (self._value(f"lstm.bias_ih_l{n}"), self._value(f"lstm.bias_hh_l{n}"))
        cells = buffers.float(f"cells{n}", rows, size)
        outputs = buffers.low(f"outputs{n}", rows, size)
        dropped = outputs if mask is None else buffers.low(f"dropped{n}", rows, size)
        sums = buffers.float("recurrent", count, 4 * size)
        for start in range(0, rows, count):
            now, before = slice(start, start + count), slice(start - count, start)
            if start:
                self.kernels.product(outputs[before], weight, sums)
            self.kernels.cell_forward(
                gates[now],
                sums if start else None,
                biases,
                cells[before] if start else None,
                None if mask is None else mask[now],
                cells[now],
                outputs[now],
                dropped[now],
            )
        return _Layer(inputs, gates, cells, outputs, dropped)

    def _cross_entropy(
        self,
        batch: PackedBatch,
        logits: Tensor,
        weights: Tensor | None,
        smoothing: float,
        buffers: _Buffers,
    ) -> Tensor:
        """The sum of the losses; `logits` become their gradients."""
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
        count = len(batch.features)
        for n in reversed(range(1, self.config.num_layers)):
            d_gates = self._lstm_backward(n, count, masks, states, d_outputs)
            d_outputs = torch.mm(
                d_gates,
                self._weight(f"lstm.weight_ih_l{n}"),
                out=self._training.low("d_between", len(d_gates), self.config.hidden_size),
            )
        d_gates = self._lstm_backward(0, count, masks, states, d_outputs)
        d_inputs = self._training.float("d_inputs", len(d_gates), self.config.embedding_size)
        self.kernels.product(d_gates, self._weight("lstm.weight_ih_l0"), d_inputs)
        if masks.inputs is not None:
            d_inputs.mul_(masks.inputs)
        embedding = self._gradient("embed.weight")
        if self.config.tie_embeddings:
            self._join()  # what follows is added to the head's gradient
        else:
            embedding.zero_()
        embedding.index_add_(0, batch.words[count:], d_inputs[count:])
        d_photo = d_inputs[:count]
        if self.config.photo_every_step:
            d_photo = d_inputs.view(-1, count, self.config.embedding_size).sum(0)
        self._photo_backward(states.photo, d_photo)
        self._join()

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Within this context work is queued on the side stream, after all that is queued so far.

        Its tensors must stay as they are until `_join`.
        """
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            yield

    def _join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def _linear_backward(self, weight: str, bias: str, inputs: Tensor, d_outputs: Tensor) -> Tensor:
        """Gradients of `inputs @ weight.t() + bias`: stores theirs, returns the inputs'."""
        with self._beside():
            self.kernels.product(d_outputs.t(), inputs, self._gradient(weight))
            self._sum_rows(d_outputs, bias)
        d_inputs = self._training.low(f"d {weight}", *inputs.shape)
        return torch.mm(d_outputs, self._weight(weight), out=d_inputs)

    def _sum_rows(self, d_outputs: Tensor, bias: str) -> None:
        """Store the gradient of a bias that was added to every row."""
        torch.sum(d_outputs, 0, dtype=torch.float32, out=self._gradient(bias))

    def _lstm_backward(
        self, n: int, count: int, masks: Masks, states: _States, d_outputs: Tensor
    ) -> Tensor:
        """Stores the gradients of a layer's parameters, returns those of its gates' sums."""
        layer, buffers = states.layers[n], self._training
        rows, size = d_outputs.shape
        mask = masks.layers[n] if masks.layers else None
        weight = self._weight(f"lstm.weight_hh_l{n}")
        d_gates = buffers.low(f"d_gates{n}", rows, 4 * size)
        d_cells = buffers.float("d_cells", count, size)
        d_recurrent = buffers.float("d_recurrent", count, size)
        for start in reversed(range(0, rows, count)):
            now, before = slice(start, start + count), slice(start - count, start)
            after = slice(start + count, start + 2 * count)
            last = start + count == rows
            if not last:
                self.kernels.product(d_gates[after], weight, d_recurrent)
            self.kernels.cell_backward(
                d_outputs[now],
                None if mask is None else mask[now],
                None if last else d_recurrent,
                d_cells,
                layer.gates[now],
                layer.cells[now],
                layer.cells[before] if start else None,
                d_gates[now],
            )
        with self._beside():
            self.kernels.product(d_gates.t(), layer.inputs, self._gradient(f"lstm.weight_ih_l{n}"))
            recurrent = self._gradient(f"lstm.weight_hh_l{n}")
            if rows > count:
                self.kernels.product(d_gates[count:].t(), layer.outputs[:-count], recurrent)
            else:
                recurrent.zero_()
            self._sum_rows(d_gates, f"lstm.bias_ih_l{n}")
            self._gradient(f"lstm.bias_hh_l{n}").copy_(self._gradient(f"lstm.bias_ih_l{n}"))
        return d_gates

    def _photo_backward(self, photo: _Photo, d_photo: Tensor) -> None:
        normalize = self.decoder.normalize
        d_projected, d_scale, d_shift = private_torch.batch_norm_backward(
            d_photo, photo.projected, normalize, photo.mean, photo.inverse, photo.measured
        )
        private_torch.copy_all_(
            [self._gradient("normalize.weight"), self._gradient("normalize.bias")],
            [d_scale, d_shift],
        )
        self._sum_rows(d_projected, "project.bias")
        self.kernels.product(
            d_projected.to(self.dtype).t(), photo.features, self._gradient("project.weight")
        )


class _Buffers:
    """Uninitialised memory that is the same at every step, as long as it is large enough.

    count, rows: the largest first dimensions that will come, of what has one line for a caption and
    of what has more.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._memory: dict[str, Tensor] = {}
        self.generation = 0  # changes when a buffer moves
        self.count = self.rows = 0

    def low(self, name: str, *shape: int) -> Tensor:
        """In the products' dtype."""
        return self._of(name, shape, self._dtype)

    def float(self, name: str, *shape: int) -> Tensor:
        return self._of(name, shape, torch.float32)

    def _of(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size:
            most = max(shape[0], self.rows if shape[0] > self.count else self.count)
            memory = torch.empty(size // shape[0] * most, dtype=dtype, device=self._device)
            self._memory[name] = memory
            self.generation += 1
        return memory[:size].view(shape)


@dataclass(frozen=True)
class _Photo:
    features: Tensor  # (B, D), after the mask
    projected: Tensor  # (B, E) float32
    normalized: Tensor  # (B, E) float32
    mean: Tensor
    inverse: Tensor
    measured: bool


@dataclass(frozen=True)
class _Layer:
    inputs: Tensor  # (R, in)
    gates: Tensor  # (R, 4H) float32: i, f, g, o
    cells: Tensor  # (R, H) float32
    outputs: Tensor  # (R, H)
    dropped: Tensor  # (R, H): the outputs times their mask


@dataclass(frozen=True)
class _States:
    photo: _Photo
    layers: list[_Layer]
    outputs: Tensor  # (R, H) of the last layer, after dropout
    before_head: Tensor  # (R, H), or (R, E) with tied embeddings
