"""The decoder's loss and gradients, written out, for a CPU: what `CaptionDecoder.loss` computes.

What autograd over an `nn.LSTM` on packed sequences does in several hundred small operations and
large fresh buffers is done here in the fewest products, over rows without padding
(`train.step.packed_batch`), in buffers that are kept from step to step:

- the input gates of all steps in one product, the recurrence in one loop of small ones;
- the logits' buffer becomes their gradient in place, a few rows at a time so that they stay in the
  processor's cache;
- products in bfloat16 where the device has instructions for them; cell states, softmax, loss and
  all parameters in float32;
- gradients go straight into the flat buffer that the optimizer reads.

LSTM equations as in Hochreiter & Schmidhuber (1997) with forget gates, gate order i, f, g, o; their
gradients are checked against autograd for every option in `tests/train/test_cpu_objective.py`. What
suits a GPU is in `train.step.cuda.objective`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train import private_torch
from train.captions.vocabulary import END, PAD
from train.model.decoder import CaptionDecoder
from train.model.flat_parameters import FlatParameters
from train.search.word_choice import NEVER
from train.step.cpu.matmul import add_product_, multiply
from train.step.dropout import NO_MASKS, Masks
from train.step.packed_batch import PackedBatch

# Rows of logits in float32 at a time: some megabytes, so that they stay in a CPU's cache.
_SOFTMAX_ROWS = 128
_SAMPLED_ROWS_MULTIPLE = 64
IMPOSSIBLE_LOGIT = -1e4  # its exponential is zero, its difference to any other logit finite


class FastObjective:
    """Computes `decoder.loss` and its gradients into `parameters.gradients`.

    dtype: of the products; float32 agrees with the plain path to rounding.
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
        self._device = parameters.values.device
        self._head = "embed.weight" if self.config.tie_embeddings else "head.weight"
        # The parameters in the products' dtype, all converted at once at the start of a step.
        self._low = parameters.values
        if dtype is not torch.float32:
            self._low = torch.empty_like(parameters.values, dtype=dtype)
        self._memory: dict[str, Tensor] = {}
        self.generation = 0  # changes when a buffer moves

    @torch.no_grad()
    def loss(self, batch: PackedBatch) -> Tensor:
        """Mean cross-entropy per target token, a float32 scalar, without dropout or smoothing."""
        hidden = self._hidden(batch, NO_MASKS, training=False).before_head
        loss, _ = self._cross_entropy(batch, self._logits(hidden), hidden, None, 0.0)
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
        """The *sum* of all target tokens' cross-entropy, a float32 scalar; its gradients replace
        what is in `parameters.gradients`. Divided by `batch.count()`, both are the plain path's:
        the optimizer divides on its way through the gradients.

        weights: (R,) float32, a factor for each row's loss. training: BatchNorm measures the batch
        and updates its running statistics, as the module does in training. drawn: the captions were
        drawn by `train.search.rollout`: what is never drawn has no probability, and nothing is
        smoothed.
        """
        smoothing = 0.0 if drawn else self.label_smoothing
        states = self._hidden(batch, masks, training=training)
        logits = self._logits(states.before_head)
        if drawn:
            # Else what a caption loses would go to words that are never drawn, and so never lose.
            for word in NEVER:
                logits[:, word] = IMPOSSIBLE_LOGIT
            logits[: batch.steps[0], END] = IMPOSSIBLE_LOGIT
        loss, smoothed = self._cross_entropy(batch, logits, states.before_head, weights, smoothing)
        self._backward(batch, masks, states, logits, smoothed if smoothing else None)
        return loss

    @torch.no_grad()
    def sample_words(self, batch: PackedBatch, rows: Tensor, uniform: Tensor) -> Tensor:
        """A word drawn from the model's distribution after each of these rows, without dropout.

        rows: (K,) int64 into the batch's rows; uniform: (K,) numbers in [0, 1). Returns (K,) int64.
        """
        # A size that oneDNN knows already: the last rows are computed and forgotten.
        filling = -len(rows) % _SAMPLED_ROWS_MULTIPLE
        chosen = torch.nn.functional.pad(rows, (0, filling))
        before_head = self._hidden(batch, NO_MASKS, training=False).before_head[chosen]
        logits = torch.addmm(self._bias("head.bias"), before_head, self._weight(self._head))
        below = logits[: len(rows)].float().softmax(1).cumsum(1)  # (K, padded W)
        words = torch.searchsorted(below, uniform.unsqueeze(1) * below[:, -1:]).squeeze(1)
        return words.clamp_max(self.config.vocab_size - 1)

    def _buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory that is the same at every step, as long as it is large enough."""
        size = torch.Size(shape).numel()
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size:
            memory = torch.empty(size, dtype=dtype or self.dtype, device=self._device)
            self._memory[name] = memory
            self.generation += 1
        return memory[:size].view(shape)

    def _weight(self, name: str) -> Tensor:
        return self.parameters.matrix(name, self._low)  # (in, out)

    def _bias(self, name: str) -> Tensor:
        return self.parameters.memory(name, self._low)

    def _hidden(self, batch: PackedBatch, masks: Masks, *, training: bool) -> _States:
        """Everything before the head."""
        if self._low is not self.parameters.values:
            self._low.copy_(self.parameters.values)
        rows, first = len(batch.words), batch.steps[0]
        count, embedding = len(batch.features), self.config.embedding_size
        photo = self._read_photo(batch, masks, training)
        inputs = self._buffer("inputs", rows, embedding)
        torch.index_select(
            self.parameters.memory("embed.weight", self._low), 0, batch.words, out=inputs
        )
        if self.config.photo_every_step:
            # Filling and the rows past a step's captions get some photo; nothing comes of it.
            inputs.add_(photo.normalized.to(self.dtype)[batch.captions.clamp_max(count - 1)])
        inputs[:count].copy_(photo.normalized)
        inputs[count:first].zero_()
        if masks.inputs is not None:
            inputs.mul_(masks.inputs)
        layers: list[_Layer] = []
        outputs = inputs
        for n in range(self.config.num_layers):
            layers.append(self._lstm_forward(n, batch, outputs))
            outputs = layers[-1].outputs
            if masks.layers:
                dropped = self._buffer(f"dropped{n}", *outputs.shape)
                outputs = torch.mul(outputs, masks.layers[n], out=dropped)
        before_head = outputs
        if self.config.tie_embeddings:
            before_head = self._buffer("transformed", rows, embedding)
            weight, bias = self._weight("transform.weight"), self._bias("transform.bias")
            multiply(outputs, weight, before_head, bias)
        return _States(photo, layers, outputs, before_head)

    def _logits(self, before_head: Tensor) -> Tensor:
        """(R, padded W)."""
        logits = self._buffer("logits", len(before_head), self.parameters.padded_words)
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
        normalized, mean, inverse = private_torch.batch_norm(projected, normalize, measure)
        if measure and normalize.num_batches_tracked is not None:
            normalize.num_batches_tracked.add_(1)
        return _Photo(features, projected, normalized, mean, inverse, measure)

    def _lstm_forward(self, n: int, batch: PackedBatch, inputs: Tensor) -> _Layer:
        rows, size = len(inputs), self.config.hidden_size
        gates = self._buffer(f"gates{n}", rows, 4 * size)
        # Both biases belong to every row.
        bias = self._bias(f"lstm.bias_ih_l{n}") + self._bias(f"lstm.bias_hh_l{n}")
        multiply(inputs, self._weight(f"lstm.weight_ih_l{n}"), gates, bias)
        recurrent = self._weight(f"lstm.weight_hh_l{n}")
        activated = self._buffer(f"activated{n}", rows, 4 * size, dtype=torch.float32)
        cells = self._buffer(f"cells{n}", rows, size, dtype=torch.float32)
        cells_tanh = self._buffer(f"cells_tanh{n}", rows, size, dtype=torch.float32)
        outputs = self._buffer(f"outputs{n}", rows, size)
        start = before = 0
        for t, count in enumerate(batch.steps):
            now, past = slice(start, start + count), slice(before, before + count)
            if t > 0:
                add_product_(gates[now], outputs[past], recurrent)
            acts = activated[now]
            acts.copy_(gates[now])
            i, f, g, o = acts.split(size, 1)
            _gate_activations_(acts, g)
            cell, squashed = cells[now], cells_tanh[now]
            torch.mul(i, g, out=cell)
            if t > 0:
                cell.addcmul_(f, cells[past])
            _tanh(cell, squashed)
            outputs[now].copy_(o * squashed)
            before, start = start, start + count
        outputs[start:].zero_()
        return _Layer(inputs, activated, cells, cells_tanh, outputs)

    def _cross_entropy(
        self,
        batch: PackedBatch,
        logits: Tensor,
        before_head: Tensor,
        weights: Tensor | None,
        smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        """(sum of the losses, (R,) smoothing factor of each row).

        `logits` become their gradients, and the output bias gets its own, but for the smoothing's
        part, which is the same for every word of a row: ε / W times the row's factor.
        """
        rows, targets = len(logits), batch.targets
        ignored = targets == PAD
        factors = (~ignored).float() if weights is None else weights.masked_fill(ignored, 0.0)
        chunk = self._buffer("softmax", _SOFTMAX_ROWS, logits.shape[1], dtype=torch.float32)
        target_logits = self._buffer("target_logits", rows, 1, dtype=torch.float32)
        target_probs = self._buffer("target_probs", rows, 1, dtype=torch.float32)
        bias_gradient = self.parameters.memory("head.bias", self.parameters.gradients)
        index = targets.unsqueeze(1)
        hit = torch.full_like(target_probs, smoothing - 1.0)
        for start in range(0, rows, _SOFTMAX_ROWS):
            now = slice(start, min(start + _SOFTMAX_ROWS, rows))
            part = chunk[: now.stop - start]
            part.copy_(logits[now])
            if smoothing:
                torch.gather(part, 1, index[now], out=target_logits[now])
            torch.softmax(part, 1, out=part)
            torch.gather(part, 1, index[now], out=target_probs[now])
            part.scatter_add_(1, index[now], hit[now])
            part.mul_(factors[now].unsqueeze(1))
            if start:
                bias_gradient.add_(part.sum(0))
            else:
                torch.sum(part, 0, out=bias_gradient)
            logits[now].copy_(part)
        losses = -target_probs.clamp_min(1e-38).log().squeeze(1)
        if smoothing:
            # -Σ_v log p_v / W is lse - mean of the logits, and lse is the target's logit + loss.
            words = self.config.vocab_size
            weight, bias = self._weight(self._head), self._bias("head.bias")
            mean_weight = weight[:, :words].float().sum(1) / words
            mean_logit = before_head.float() @ mean_weight + bias[:words].float().mean()
            uniform = target_logits.squeeze(1) + losses - mean_logit
            losses = (1 - smoothing) * losses + smoothing * uniform
        return (losses * factors).sum(), factors * smoothing / self.config.vocab_size

    def _backward(
        self,
        batch: PackedBatch,
        masks: Masks,
        states: _States,
        d_logits: Tensor,
        smoothed: Tensor | None,
    ) -> None:
        parameters, gradients = self.parameters, self.parameters.gradients
        d_outputs = self._product_backward(
            self._head, states.before_head, d_logits, "d_before_head"
        )
        if smoothed is not None:
            self._smooth(states.before_head, d_outputs, smoothed)
        if self.config.tie_embeddings:
            self._sum_rows(d_outputs, "transform.bias")
            d_outputs = self._product_backward(
                "transform.weight", states.outputs, d_outputs, "d_outputs"
            )
        for n in reversed(range(self.config.num_layers)):
            if masks.layers:
                d_outputs.mul_(masks.layers[n])
            d_outputs = self._lstm_backward(n, batch, states.layers[n], d_outputs)
        if masks.inputs is not None:
            d_outputs.mul_(masks.inputs)
        d_inputs = self._buffer("d_inputs_float", *d_outputs.shape, dtype=torch.float32)
        d_inputs.copy_(d_outputs)
        embedding = parameters.memory("embed.weight", gradients)
        if not self.config.tie_embeddings:
            embedding.zero_()
        first, last = batch.steps[0], sum(batch.steps)
        embedding.index_add_(0, batch.words[first:last], d_inputs[first:last])
        count = len(batch.features)
        d_photo = d_inputs[:count]
        if self.config.photo_every_step:
            d_photo.index_add_(
                0, batch.captions[first:last].clamp_max(count - 1), d_inputs[first:last]
            )
        self._photo_backward(batch, states.photo, d_photo)

    def _product_backward(
        self, weight: str, inputs: Tensor, d_outputs: Tensor, name: str
    ) -> Tensor:
        """Gradients of `inputs @ weight`: stores the weight's, returns the inputs' in a buffer."""
        matrix = self._weight(weight)  # (in, out)
        self._weight_gradient(weight, inputs, d_outputs)
        return multiply(d_outputs, matrix.t(), self._buffer(name, *inputs.shape))

    def _weight_gradient(self, weight: str, inputs: Tensor, d_outputs: Tensor) -> None:
        """Store inputs.t() @ d_outputs, in float32 whatever the products' dtype."""
        gradient = self.parameters.matrix(weight, self.parameters.gradients)
        if self.dtype is torch.float32:
            multiply(inputs.t(), d_outputs, gradient)
        else:
            product = self._buffer(f"d_{weight}", *gradient.shape)
            gradient.copy_(multiply(inputs.t(), d_outputs, product))

    def _sum_rows(self, d_outputs: Tensor, bias: str) -> None:
        """Store the gradient of a bias that was added to every row."""
        out = self.parameters.memory(bias, self.parameters.gradients)
        torch.sum(d_outputs, 0, dtype=torch.float32, out=out)

    def _smooth(self, before_head: Tensor, d_before_head: Tensor, smoothed: Tensor) -> None:
        """Add what uniform targets bring: -ε / W for every word, a matrix of rank one.

        smoothed: (R,) ε / W times each row's factor.
        """
        gradients, words = self.parameters.gradients, self.config.vocab_size
        weight = self._weight(self._head)[:, :words]
        d_before_head.addr_(
            smoothed.to(self.dtype), weight.float().sum(1).to(self.dtype), alpha=-1.0
        )
        weighted = before_head.t().float() @ smoothed  # (in,)
        self.parameters.matrix(self._head, gradients)[:, :words].sub_(weighted.unsqueeze(1))
        self.parameters.memory("head.bias", gradients)[:words].sub_(smoothed.sum())

    def _lstm_backward(
        self, n: int, batch: PackedBatch, layer: _Layer, d_outputs: Tensor
    ) -> Tensor:
        rows, size = d_outputs.shape
        gradients, steps = self.parameters.gradients, batch.steps
        recurrent = self._weight(f"lstm.weight_hh_l{n}").t()  # (4H, H)
        d_hidden = self._buffer("d_hidden", rows, size, dtype=torch.float32)
        d_hidden.copy_(d_outputs)
        d_gates = self._buffer("d_gates", rows, 4 * size)
        d_acts_all = self._buffer("d_acts", steps[0], 4 * size, dtype=torch.float32)
        d_cell_all = self._buffer("d_cell", steps[0], size, dtype=torch.float32).zero_()
        scratch_all = self._buffer("scratch", steps[0], size, dtype=torch.float32)
        d_before_all = self._buffer("d_before", steps[0], size)
        start = sum(steps)
        d_gates[start:].zero_()
        for t in reversed(range(len(steps))):
            count = steps[t]
            start -= count
            now = slice(start, start + count)
            past = slice(start - steps[t - 1], start - steps[t - 1] + count) if t else None
            i, f, g, o = layer.activated[now].split(size, 1)
            squashed, d_now = layer.cells_tanh[now], d_hidden[now]
            d_cell, scratch = d_cell_all[:count], scratch_all[:count]
            d_acts = d_acts_all[:count]
            d_i, d_f, d_g, d_o = d_acts.split(size, 1)
            torch.mul(d_now, o, out=scratch)
            d_cell.add_(private_torch.tanh_backward_(scratch, squashed))
            torch.mul(d_now, squashed, out=d_o)
            torch.mul(d_cell, g, out=d_i)
            torch.mul(d_cell, i, out=d_g)
            if past is None:
                d_f.zero_()
            else:
                torch.mul(d_cell, layer.cells[past], out=d_f)
            private_torch.sigmoid_backward_(d_o, o)
            private_torch.sigmoid_backward_(
                d_acts[:, : 2 * size], layer.activated[now][:, : 2 * size]
            )
            private_torch.tanh_backward_(d_g, g)
            d_gates[now].copy_(d_acts)
            if past is not None:
                d_cell.mul_(f)
                d_hidden[past].add_(multiply(d_gates[now], recurrent, d_before_all[:count]))
        d_inputs = self._product_backward(
            f"lstm.weight_ih_l{n}", layer.inputs, d_gates, f"d_inputs{n}"
        )
        self._sum_rows(d_gates, f"lstm.bias_ih_l{n}")
        hidden_bias = self.parameters.memory(f"lstm.bias_hh_l{n}", gradients)
        hidden_bias.copy_(self.parameters.memory(f"lstm.bias_ih_l{n}", gradients))
        before = self._buffer("hidden_before", rows, size)
        torch.index_select(layer.outputs, 0, batch.previous, out=before)
        before[: steps[0]].zero_()
        self._weight_gradient(f"lstm.weight_hh_l{n}", before, d_gates)
        return d_inputs

    def _photo_backward(self, batch: PackedBatch, photo: _Photo, d_photo: Tensor) -> None:
        normalize, gradients = self.decoder.normalize, self.parameters.gradients
        d_projected, d_scale, d_shift = private_torch.batch_norm_backward(
            d_photo, photo.projected, normalize, photo.mean, photo.inverse, photo.measured
        )
        self.parameters.memory("normalize.weight", gradients).copy_(d_scale)
        self.parameters.memory("normalize.bias", gradients).copy_(d_shift)
        self.parameters.memory("project.bias", gradients).copy_(d_projected.sum(0))
        self.parameters.matrix("project.weight", gradients).copy_(
            photo.features.t() @ d_projected.to(self.dtype)
        )


@dataclass(frozen=True)
class _Photo:
    features: Tensor  # (B, D)
    projected: Tensor  # (B, E) float32
    normalized: Tensor  # (B, E) float32
    mean: Tensor
    inverse: Tensor
    measured: bool


@dataclass(frozen=True)
class _Layer:
    inputs: Tensor  # (R, in)
    activated: Tensor  # (R, 4H) float32: i, f, g, o
    cells: Tensor  # (R, H) float32
    cells_tanh: Tensor  # (R, H) float32
    outputs: Tensor  # (R, H)


@dataclass(frozen=True)
class _States:
    photo: _Photo
    layers: list[_Layer]
    outputs: Tensor  # (R, H) of the last layer, after dropout
    before_head: Tensor  # (R, H), or (R, E) with tied embeddings


def _gate_activations_(acts: Tensor, g: Tensor) -> None:
    """Sigmoid of i, f, o and tanh of g, in place.

    On a CPU one sigmoid over all of it is three times as fast as torch's tanh of a quarter.
    """
    g.mul_(2)
    acts.sigmoid_()
    g.mul_(2).sub_(1)


def _tanh(values: Tensor, out: Tensor) -> None:
    torch.mul(values, 2, out=out)
    out.sigmoid_().mul_(2).sub_(1)
