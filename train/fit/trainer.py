"""The training loop: from a caption set to a trained decoder, one report a step.

`Trainer` knows no files and prints nothing; `train.fit.run` gives it a run folder.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.captions.caption_set import Batch, CaptionSet, epoch_batches, epoch_views
from train.captions.vocabulary import Vocabulary
from train.config import Recipe
from train.fit.self_critical import SelfCritical
from train.model.decoder import CaptionDecoder
from train.step.cuda.graphs import GraphedSteps, graph_length
from train.step.cuda.objective import CudaObjective
from train.step.cuda.step_inputs import StepInputs
from train.step.dropout import draw_masks
from train.step.objective import flat_parameters, objective_for, product_dtype
from train.step.optimizer import FlatAdamW, learning_rate
from train.step.packed_batch import PackedBatch, gather_packed, pack
from train.step.scheduled_sampling import with_sampled_words
from train.step.weight_average import WeightAverage

# For BatchNorm's statistics under averaged weights; a tenth of a second.
_MEASURED_PHOTOS = 8192
# At a time, on a GPU: as many as keep it busy; their logits take 150 MB at COCO's size.
_GPU_VALIDATION_CAPTIONS = 512


@dataclass(frozen=True)
class Step:
    """After an optimizer step. Epochs and steps count from 0; `loss` stays on the device."""

    epoch: int
    step: int  # of this epoch
    steps: int  # in every epoch of its kind
    captions: int
    loss: Tensor  # scalar: mean cross-entropy per target token; self-critical: minus the reward


class Trainer:
    """Trains a decoder in place. Everything random comes from the seed, the epoch and the step, so
    going on after an interruption with the same state gives the same weights.

    precision: of the fast path's products: `auto`, `float32` or `bfloat16`. plain: the readable
    reference (`CaptionDecoder.loss` and autograd, in float32) instead of the fast path.
    """

    def __init__(
        self,
        decoder: CaptionDecoder,
        captions: CaptionSet,
        recipe: Recipe,
        *,
        seed: int,
        vocabulary: Vocabulary | None = None,
        precision: str = "auto",
        plain: bool = False,
    ) -> None:
        """vocabulary: of the captions; self-critical epochs need it."""
        self.decoder = decoder
        self.captions = captions
        self.recipe = recipe
        self.seed = seed
        device = captions.device
        self.parameters = flat_parameters(decoder)
        self._inputs = StepInputs(recipe.batch_size, device)
        numbers = self._inputs.numbers
        self.average: WeightAverage | None = None
        if recipe.average_decay:
            self.average = WeightAverage(self.parameters, recipe.average_decay, numbers[2])
        dtype = product_dtype(device) if precision == "auto" else getattr(torch, precision)
        self.objective = objective_for(
            decoder, self.parameters, dtype=dtype, label_smoothing=recipe.label_smoothing
        )
        self.optimizer = self._optimizer(numbers[1])
        self._vocabulary = vocabulary
        self._self_critical: SelfCritical | None = None  # made when it is needed
        self._plain = plain
        self.graphs: GraphedSteps | None = None
        if device.type == "cuda" and not plain and not recipe.scheduled_sampling:
            self.graphs = GraphedSteps(self._gather_and_update, lambda: self.objective.generation)
            assert isinstance(self.objective, CudaObjective)
            longest = graph_length(int(captions.lengths.max()))
            self.objective.reserve(recipe.batch_size, longest)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Step]:
        """Train through this epoch, from `first_step` on: by cross-entropy, or by reward in the
        self-critical epochs that follow.
        """
        if epoch >= self.recipe.epochs:
            return self._rewarded_epoch(epoch, first_step)
        return self._epoch(epoch, first_step)

    def _epoch(self, epoch: int, first_step: int) -> Iterator[Step]:
        captions, recipe = self.captions, self.recipe
        batches = epoch_batches(captions.lengths, recipe.batch_size, seed=self.seed, epoch=epoch)
        count = captions.views if recipe.random_views else 1
        views = epoch_views(len(captions), count, seed=self.seed, epoch=epoch)
        steps = len(batches)
        for step, chosen in enumerate(batches[first_step:], first_step):
            seen = None if views is None else views[chosen]
            loss = self._step(chosen, seen, epoch, epoch * steps + step, recipe.epochs * steps)
            yield Step(epoch, step, steps, len(chosen), loss)

    def _rewarded_epoch(self, epoch: int, first_step: int) -> Iterator[Step]:
        recipe = self.recipe
        if self._self_critical is None:
            assert self._vocabulary is not None
            self._self_critical = SelfCritical(
                self.decoder,
                self.objective,
                self.captions,
                self._vocabulary,
                samples=recipe.self_critical_samples,
                anchor=recipe.self_critical_anchor,
            )
        if epoch == recipe.epochs and not first_step:
            self._start_anew()
        self.optimizer.set_rate(recipe.self_critical_rate)
        batches = self._self_critical.epoch(
            recipe.self_critical_photos, seed=self.seed, epoch=epoch
        )
        for step, (photos, views) in enumerate(batches[first_step:], first_step):
            position = (epoch - recipe.epochs) * len(batches) + step
            count, reward = self._self_critical.gradients(
                photos, views, _step_seed(self.seed + 1, position)
            )
            if self.average is not None:
                self.average.set_step(position)
            self._apply(count)
            yield Step(
                epoch, step, len(batches), len(photos) * recipe.self_critical_samples, -reward
            )

    def _start_anew(self) -> None:
        """Go on from the averaged weights, with an optimizer that remembers nothing."""
        if self.average is not None:
            self.average.take()
            self._measure_photos()
        self.optimizer = self._optimizer(None)

    def _step(
        self,
        chosen: NDArray[np.int64],
        views: NDArray[np.int64] | None,
        epoch: int,
        position: int,
        steps: int,
    ) -> Tensor:
        """position: of this step among all `steps` of training by cross-entropy."""
        recipe, seed = self.recipe, _step_seed(self.seed, position)
        rate = learning_rate(recipe, position, steps)
        if self.graphs is not None:
            return self._graphed_step(self.graphs, chosen, views, rate, position, seed)
        self.optimizer.set_rate(rate)
        if self.average is not None:
            self.average.set_step(position)
        batch = self.captions.batch(chosen, views)
        share = recipe.scheduled_sampling * epoch / max(1, recipe.epochs - 1)
        if share:
            batch = with_sampled_words(self.objective, batch, share, seed)
        if self._plain:
            return self._plain_update(batch, seed)
        if self.captions.device.type == "cuda":  # where masks are drawn on the device
            torch.cuda.manual_seed(seed)
            return self._update(batch, None)
        return self._update(batch, seed)

    def _graphed_step(
        self,
        graphs: GraphedSteps,
        chosen: NDArray[np.int64],
        views: NDArray[np.int64] | None,
        rate: float,
        position: int,
        seed: int,
    ) -> Tensor:
        """Nothing but launches: all that this step has of its own goes to the device at once."""
        config, lengths = self.decoder.config, self.captions.lengths[chosen]
        if config.dropout or config.feature_dropout:
            torch.cuda.manual_seed(seed)
        inputs = self._inputs.send(
            chosen,
            self.captions.full_view if views is None else views,
            tokens=int(lengths.sum()),
            rate=rate,
            average_weight=self.average.weight_at(position) if self.average else 0.0,
        )
        assert isinstance(self.objective, CudaObjective)
        self.objective.refresh()
        return graphs.run(*inputs, graph_length(int(lengths.max())))

    def _gather_and_update(self, captions: Tensor, views: Tensor, length: int) -> Tensor:
        assert isinstance(self.objective, CudaObjective)
        kernels = self.objective.kernels
        packed = gather_packed(self.captions, kernels, captions, views, length)
        return self._update_packed(packed, self._inputs.numbers[0], None)

    def _update(self, batch: Batch, seed: int | None) -> Tensor:
        packed = pack(batch, round_up=self.captions.device.type == "cpu")
        return self._update_packed(packed, packed.count(), seed)

    def _update_packed(self, packed: PackedBatch, count: Tensor, seed: int | None) -> Tensor:
        """count: of the targets. seed: of this step's dropout; None: the device's generator is
        seeded already.
        """
        masks = draw_masks(self.decoder.config, packed, self.objective.dtype, seed)
        loss = self.objective.loss_and_gradients(packed, masks)
        self._apply(count)
        return loss / count

    def _plain_update(self, batch: Batch, seed: int) -> Tensor:
        torch.manual_seed(seed)  # of dropout
        self.decoder.train()
        # BatchNorm cannot measure one row; a last batch of one caption uses running statistics.
        self.decoder.normalize.train(len(batch.targets) > 1)
        self.parameters.gradients.zero_()
        with _without_tf32(), warnings.catch_warnings():
            # Autograd is told that transposed gradients may be slow, which is meant here.
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            # cuDNN, that the LSTM's weights would be faster in a buffer of its own.
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
            loss = self.decoder.loss(batch, self.recipe.label_smoothing)
            loss.backward()
        self._apply(torch.ones((), device=loss.device))
        return loss.detach()

    def _apply(self, count: Tensor) -> None:
        low = self.objective.low if isinstance(self.objective, CudaObjective) else None
        self.optimizer.step(count, self.average, low)

    def _optimizer(self, rate: Tensor | None) -> FlatAdamW:
        kernels = self.objective.kernels if isinstance(self.objective, CudaObjective) else None
        return FlatAdamW(self.parameters, self.recipe, rate=rate, kernels=kernels)

    @contextlib.contextmanager
    def best_weights(self) -> Iterator[None]:
        """Within this context the decoder is as it is to be judged and saved: in eval mode, with
        the averaged weights where the recipe averages.
        """
        self.decoder.eval()
        if self.average is None:
            yield
            return
        normalize = self.decoder.normalize
        kept = [buffer.clone() for buffer in normalize.buffers()]
        try:
            with self.average.in_place():
                self._measure_photos()
                yield
        finally:
            for buffer, value in zip(normalize.buffers(), kept, strict=True):
                buffer.copy_(value)

    @torch.no_grad()
    def _measure_photos(self) -> None:
        """Give BatchNorm the statistics of these weights: those it has are of other ones.

        Averaged weights project photos to a smaller spread than the noisy ones that BatchNorm saw.
        """
        captions, normalize = self.captions, self.decoder.normalize
        random = np.random.default_rng((self.seed, 3))
        count = min(_MEASURED_PHOTOS, len(captions))
        rows = captions.feature_rows[random.permutation(len(captions))[:count]]
        views = np.full(count, captions.full_view)
        if self.recipe.random_views:
            views = random.integers(captions.views, size=count)
        projected = self.decoder.project(captions.photo_features(rows, views).float())
        assert normalize.running_mean is not None
        assert normalize.running_var is not None
        if count > 1:
            normalize.running_mean.copy_(projected.mean(0))
            normalize.running_var.copy_(projected.var(0))

    @torch.no_grad()  # not inference mode: the objective's buffers may grow here, to be trained in
    def validation_loss(self, captions: CaptionSet) -> float:
        """Mean cross-entropy per target token over all captions, without dropout or smoothing."""
        self.decoder.eval()
        total, tokens = torch.zeros((), device=captions.device, dtype=torch.float64), 0
        # Captions of like length share a batch: less padding, the same sum.
        order = np.argsort(captions.lengths, kind="stable")
        size = self.recipe.batch_size
        if captions.device.type == "cuda":
            size = max(size, _GPU_VALIDATION_CAPTIONS)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch, count = captions.batch(chosen), int(captions.lengths[chosen].sum())
            if self._plain:
                with _without_tf32():
                    loss = self.decoder.loss(batch)
            else:
                loss = self.objective.loss(pack(batch, round_up=captions.device.type == "cpu"))
            total += loss.double() * count
            tokens += count
        return float(total) / tokens

    def state(self) -> dict[str, Any]:
        """Weights, optimizer and average as plain tensors: what `load` takes."""
        return {
            "parameters": self.parameters.named(self.parameters.values),
            "buffers": {n: b.cpu().clone() for n, b in self.decoder.named_buffers()},
            "optimizer": self.optimizer.state(),
            "average": self.average.state() if self.average else None,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises KeyError, RuntimeError or TypeError if the state is of another decoder."""
        self.parameters.load(state["parameters"], self.parameters.values)
        for name, buffer in self.decoder.named_buffers():
            buffer.copy_(state["buffers"][name])
        self.optimizer.load(state["optimizer"])
        if self.average is not None:
            self.average.load(state["average"])


def _without_tf32() -> AbstractContextManager[None]:
    """cuDNN's LSTM rounds float32 to ten bits unless told not to."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return flags


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
