"""The loss of `CaptionDecoder.loss` and its gradients on a CPU, written out by hand.

Autograd over an `nn.LSTM` on packed sequences runs several hundred small operations and allocates
large buffers at every step. This module computes the same with the fewest products, over rows
without padding (`train.step.packed_batch`), in buffers that are kept from step to step:

- One product gives the input gates of all steps; only the recurrence is a loop of small products.
- The logits become their gradient in place, a few rows at a time, so that these rows stay in the
  processor's cache.
- Products are in bfloat16 where the device has instructions for it; cell states, softmax, loss and
  all parameters are in float32.
- Gradients are written straight into the flat buffer that the optimizer reads.

`tests/train/test_cpu_objective.py` checks the gradients against autograd for every option.
`train.step.cuda.objective` is the counterpart for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train import private_torch
from train.captions.vocabulary import PAD
from train.model.decoder import CaptionDecoder
from train.model.flat_parameters import FlatParameters
from train.step.buffers import Buffers
from train.step.cpu.lstm import LstmStates, lstm_backward, lstm_forward
from train.step.cpu.matmul import multiply
from train.step.dropout import NO_MASKS, Masks
from train.step.logits import rule_out_undrawn_words
from train.step.packed_batch import PackedBatch, of_all_photos

# The softmax takes this many rows of float32 logits at a time: some megabytes, which fit a CPU's
# cache.
_SOFTMAX_ROWS = 128
# Below this, the loss is not taken of the probability, which float32 cannot hold much further down.
_LEAST_PROBABILITY = 1e-30


class CpuObjective:
    """Computes `decoder.loss` and its gradients into `parameters.gradients`.

    Needs parameters laid out as (in, out). dtype: of the products; with float32 the results agree
    with the plain decoder's to rounding.
    """

    def __init__(
        self,
        decoder: CaptionDecoder,
        parameters: FlatParameters,
        *,
        dtype: torch.dtype,
        label_smoothing: float = 0.0,
    ) -> None:
        self.decoder = decoder
        self.parameters = parameters
        self.dtype = dtype
        self.label_smoothing = label_smoothing
        self.config = decoder.config
        self._head = "embed.weight" if self.config.tie_embeddings else "head.weight"
        # The parameters in the products' dtype, all converted at once at the start of a step.
        self._product_values = parameters.values
        if dtype is not torch.float32:
            self._product_values = torch.empty_like(parameters.values, dtype=dtype)
        self._buffers = Buffers(dtype, parameters.values.device)

    @property
    def generation(self) -> int:
        """Changes when a buffer moves."""
        return self._buffers.generation

    @torch.no_grad()
    def loss(self, batch: PackedBatch) -> Tensor:
        """Mean cross-entropy per target token, a float32 scalar, without dropout or smoothing."""
        before_head = self._hidden(batch, NO_MASKS, training=False).before_head
        loss, _ = self._cross_entropy(batch, self._logits(before_head), before_head, None, 0.0)
        return loss / batch.count()

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
        """The *sum* of all target tokens' cross-entropy, a float32 scalar. The gradients of this
        sum replace the contents of `parameters.gradients`. The plain decoder's loss and gradients
        are both divided by `batch.count()`, which the optimizer does while it reads the gradients.

        weights: (R,) float32, a factor for each row's loss. training: BatchNorm measures the batch
        and updates its running statistics, as the module does in training. drawn: the captions were
        drawn by `train.search.rollout`; words that it never draws then get no probability, and
        targets are not smoothed.
        """
        smoothing = 0.0 if drawn else self.label_smoothing
        states = self._hidden(batch, masks, training=training)
        logits = self._logits(states.before_head)
        if drawn:
            rule_out_undrawn_words(logits, batch.steps[0])
        loss, smoothing_factors = self._cross_entropy(
            batch, logits, states.before_head, weights, smoothing
        )
        self._backward(batch, masks, states, logits, smoothing_factors if smoothing else None)
        return loss

    def _weight(self, name: str) -> Tensor:
        return self.parameters.matrix(name, self._product_values)  # (in, out)

    def _bias(self, name: str) -> Tensor:
        return self.parameters.memory(name, self._product_values)

    def _hidden(self, batch: PackedBatch, masks: Masks, *, training: bool) -> _States:
        """The forward pass up to the head."""
        if self._product_values is not self.parameters.values:
            self._product_values.copy_(self.parameters.values)
        rows, first_rows = len(batch.words), batch.steps[0]
        captions, embedding_size = batch.size, self.config.embedding_size
        photo = self._read_photo(batch, masks, training)
        inputs = self._buffers.low("inputs", rows, embedding_size)
        torch.index_select(
            self.parameters.memory("embed.weight", self._product_values), 0, batch.words, out=inputs
        )
        if self.config.photo_every_step:
            # Filling rows past the last caption read the last photo; their results are not used.
            inputs.add_(photo.normalized.to(self.dtype)[batch.captions.clamp_max(captions - 1)])
        inputs[:captions].copy_(photo.normalized)
        inputs[captions:first_rows].zero_()
        if masks.inputs is not None:
            inputs.mul_(masks.inputs)
        layers: list[_Layer] = []
        outputs = inputs
        for n in range(self.config.num_layers):
            layers.append(self._layer_forward(n, batch, outputs))
            outputs = layers[-1].states.outputs
            if masks.layers:
                dropped = self._buffers.low(f"dropped{n}", *outputs.shape)
                outputs = torch.mul(outputs, masks.layers[n], out=dropped)
        before_head = outputs
        if self.config.tie_embeddings:
            before_head = self._buffers.low("transformed", rows, embedding_size)
            weight, bias = self._weight("transform.weight"), self._bias("transform.bias")
            multiply(outputs, weight, before_head, bias)
        return _States(photo, layers, outputs, before_head)

    def _logits(self, before_head: Tensor) -> Tensor:
        """(R, padded W)."""
        logits = self._buffers.low("logits", len(before_head), self.parameters.padded_words)
        return multiply(before_head, self._weight(self._head), logits, self._bias("head.bias"))

    def _read_photo(self, batch: PackedBatch, masks: Masks, training: bool) -> _Photo:
        normalize = self.decoder.normalize
        # BatchNorm cannot measure one row.
        measure = training and len(batch.features) > 1
        features = batch.features.to(self.dtype)
        if masks.features is not None:
            features.mul_(masks.features)
        projected = torch.addmm(
            self._bias("project.bias"), features, self._weight("project.weight")
        ).float()
        normalized, mean, inverse_std = private_torch.batch_norm(projected, normalize, measure)
        if measure and normalize.num_batches_tracked is not None:
            normalize.num_batches_tracked.add_(1)
        if batch.share is not None:
            normalized = normalized[batch.share]
        return _Photo(features, projected, normalized, mean, inverse_std, measure)

    def _layer_forward(self, n: int, batch: PackedBatch, inputs: Tensor) -> _Layer:
        gate_sums = self._buffers.low(f"gate_sums{n}", len(inputs), 4 * self.config.hidden_size)
        bias = self._bias(f"lstm.bias_ih_l{n}") + self._bias(f"lstm.bias_hh_l{n}")
        multiply(inputs, self._weight(f"lstm.weight_ih_l{n}"), gate_sums, bias)
        recurrent_weight = self._weight(f"lstm.weight_hh_l{n}")
        states = lstm_forward(n, gate_sums, recurrent_weight, batch.steps, self._buffers)
        return _Layer(inputs, states)

    def _cross_entropy(
        self,
        batch: PackedBatch,
        logits: Tensor,
        before_head: Tensor,
        weights: Tensor | None,
        smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        """(sum of the losses, (R,) factors of the smoothing).

        The logits become their gradients, and the gradient of the output bias is stored, both
        without the smoothing's part. That part is the same for every word of a row: minus the
        row's factor, which is ε / W times its weight.
        """
        rows, targets = len(logits), batch.targets
        ignored = targets == PAD
        row_weights = (~ignored).float() if weights is None else weights.masked_fill(ignored, 0.0)
        chunk = self._buffers.float("softmax", _SOFTMAX_ROWS, logits.shape[1])
        target_logits = self._buffers.float("target_logits", rows, 1)
        target_probs = self._buffers.float("target_probs", rows, 1)
        bias_gradient = self.parameters.memory("head.bias", self.parameters.gradients)
        index = targets.unsqueeze(1)
        at_target = torch.full_like(target_probs, smoothing - 1.0)
        unlikely: list[tuple[Tensor, Tensor]] = []  # rows, and their losses by log-sum-exp
        for start in range(0, rows, _SOFTMAX_ROWS):
            part = slice(start, min(start + _SOFTMAX_ROWS, rows))
            values = chunk[: part.stop - start]  # logits, then probabilities, then gradients
            values.copy_(logits[part])
            if smoothing:
                torch.gather(values, 1, index[part], out=target_logits[part])
            torch.softmax(values, 1, out=values)
            torch.gather(values, 1, index[part], out=target_probs[part])
            too_low = target_probs[part, 0] < _LEAST_PROBABILITY
            found = too_low.logical_and_(~ignored[part]).nonzero().squeeze(1)
            if len(found):
                found += start
                exact = logits[found].float()
                target = exact.gather(1, index[found]).squeeze(1)
                unlikely.append((found, exact.logsumexp(1) - target))
            values.scatter_add_(1, index[part], at_target[part])
            values.mul_(row_weights[part].unsqueeze(1))
            if start:
                bias_gradient.add_(values.sum(0))
            else:
                torch.sum(values, 0, out=bias_gradient)
            logits[part].copy_(values)
        losses = -target_probs.clamp_min(_LEAST_PROBABILITY).log().squeeze(1)
        for found, exact in unlikely:
            losses[found] = exact
        if smoothing:
            # The loss against uniform targets, -Σ_v log p_v / W, is the log-sum-exp of the logits
            # minus their mean; the log-sum-exp is the target's logit plus its loss.
            words = self.config.vocab_size
            weight, bias = self._weight(self._head), self._bias("head.bias")
            mean_weight = weight[:, :words].float().sum(1) / words
            mean_logit = before_head.float() @ mean_weight + bias[:words].float().mean()
            uniform = target_logits.squeeze(1) + losses - mean_logit
            losses = (1 - smoothing) * losses + smoothing * uniform
        return (losses * row_weights).sum(), row_weights * smoothing / self.config.vocab_size

    def _backward(
        self,
        batch: PackedBatch,
        masks: Masks,
        states: _States,
        d_logits: Tensor,
        smoothing_factors: Tensor | None,
    ) -> None:
        """Store all gradients but the output bias's, which `_cross_entropy` has stored."""
        parameters, gradients = self.parameters, self.parameters.gradients
        d_outputs = self._product_backward(
            self._head, states.before_head, d_logits, "d_before_head"
        )
        if smoothing_factors is not None:
            self._add_smoothing(states.before_head, d_outputs, smoothing_factors)
        if self.config.tie_embeddings:
            self._sum_rows(d_outputs, "transform.bias")
            d_outputs = self._product_backward(
                "transform.weight", states.outputs, d_outputs, "d_outputs"
            )
        for n in reversed(range(self.config.num_layers)):
            if masks.layers:
                d_outputs.mul_(masks.layers[n])
            d_outputs = self._layer_backward(n, batch, states.layers[n], d_outputs)
        if masks.inputs is not None:
            d_outputs.mul_(masks.inputs)
        d_inputs = self._buffers.float("d_inputs_float", *d_outputs.shape)
        d_inputs.copy_(d_outputs)
        embedding = parameters.memory("embed.weight", gradients)
        if not self.config.tie_embeddings:
            embedding.zero_()
        first, last = batch.steps[0], sum(batch.steps)
        embedding.index_add_(0, batch.words[first:last], d_inputs[first:last])
        captions = batch.size
        d_photo = d_inputs[:captions]
        if self.config.photo_every_step:
            d_photo.index_add_(
                0, batch.captions[first:last].clamp_max(captions - 1), d_inputs[first:last]
            )
        self._photo_backward(states.photo, of_all_photos(batch, d_photo))

    def _product_backward(
        self, weight: str, inputs: Tensor, d_outputs: Tensor, buffer: str
    ) -> Tensor:
        """Store the gradient of `weight` in `inputs @ weight`; return that of `inputs`.

        buffer: the name of the buffer that is returned.
        """
        matrix = self._weight(weight)  # (in, out)
        self._weight_gradient(weight, inputs, d_outputs)
        return multiply(d_outputs, matrix.t(), self._buffers.low(buffer, *inputs.shape))

    def _weight_gradient(self, weight: str, inputs: Tensor, d_outputs: Tensor) -> None:
        """Store inputs.t() @ d_outputs, converted to float32 from the products' dtype."""
        gradient = self.parameters.matrix(weight, self.parameters.gradients)
        if self.dtype is torch.float32:
            multiply(inputs.t(), d_outputs, gradient)
        else:
            product = self._buffers.low(f"d_{weight}", *gradient.shape)
            gradient.copy_(multiply(inputs.t(), d_outputs, product))

    def _sum_rows(self, d_outputs: Tensor, bias: str) -> None:
        """Store the gradient of a bias that was added to every row."""
        out = self.parameters.memory(bias, self.parameters.gradients)
        torch.sum(d_outputs, 0, dtype=torch.float32, out=out)

    def _add_smoothing(
        self, before_head: Tensor, d_before_head: Tensor, smoothing_factors: Tensor
    ) -> None:
        """Add the gradients that come from uniform targets. The logits' part of these is a matrix
        of rank one, the negative factor (R,) of each row for every word.
        """
        gradients, words = self.parameters.gradients, self.config.vocab_size
        weight = self._weight(self._head)[:, :words]
        d_before_head.addr_(
            smoothing_factors.to(self.dtype), weight.float().sum(1).to(self.dtype), alpha=-1.0
        )
        weighted = before_head.t().float() @ smoothing_factors  # (in,)
        self.parameters.matrix(self._head, gradients)[:, :words].sub_(weighted.unsqueeze(1))
        self.parameters.memory("head.bias", gradients)[:words].sub_(smoothing_factors.sum())

    def _layer_backward(
        self, n: int, batch: PackedBatch, layer: _Layer, d_outputs: Tensor
    ) -> Tensor:
        """Store the gradients of an LSTM layer's parameters; return that of its inputs."""
        gradients, outputs = self.parameters.gradients, layer.states.outputs
        recurrent_weight = self._weight(f"lstm.weight_hh_l{n}")
        d_gate_sums = lstm_backward(
            layer.states, recurrent_weight, batch.steps, d_outputs, self._buffers
        )
        d_inputs = self._product_backward(
            f"lstm.weight_ih_l{n}", layer.inputs, d_gate_sums, f"d_inputs{n}"
        )
        self._sum_rows(d_gate_sums, f"lstm.bias_ih_l{n}")
        hidden_bias = self.parameters.memory(f"lstm.bias_hh_l{n}", gradients)
        hidden_bias.copy_(self.parameters.memory(f"lstm.bias_ih_l{n}", gradients))
        previous_outputs = self._buffers.low("previous_outputs", *outputs.shape)
        torch.index_select(outputs, 0, batch.previous, out=previous_outputs)
        previous_outputs[: batch.steps[0]].zero_()
        self._weight_gradient(f"lstm.weight_hh_l{n}", previous_outputs, d_gate_sums)
        return d_inputs

    def _photo_backward(self, photo: _Photo, d_photo: Tensor) -> None:
        normalize, gradients = self.decoder.normalize, self.parameters.gradients
        d_projected, d_scale, d_shift = private_torch.batch_norm_backward(
            d_photo, photo.projected, normalize, photo.mean, photo.inverse_std, photo.measured
        )
        self.parameters.memory("normalize.weight", gradients).copy_(d_scale)
        self.parameters.memory("normalize.bias", gradients).copy_(d_shift)
        self.parameters.memory("project.bias", gradients).copy_(d_projected.sum(0))
        self.parameters.matrix("project.weight", gradients).copy_(
            photo.features.t() @ d_projected.to(self.dtype)
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
    states: LstmStates


@dataclass(frozen=True)
class _States:
    photo: _Photo
    layers: list[_Layer]
    outputs: Tensor  # (R, H) of the last layer, after dropout
    before_head: Tensor  # (R, H), or (R, E) with tied embeddings
