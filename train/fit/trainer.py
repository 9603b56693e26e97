"""Trains a decoder on a caption set, step by step.

`Trainer` reads and writes no files and prints nothing; `train.fit.run` does that around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.captions.caption_set import Batch, CaptionSet
from train.captions.epoch_order import epoch_batches, epoch_views
from train.captions.streaming.window import WindowedOrder
from train.captions.vocabulary import Vocabulary
from train.config import Recipe
from train.fit.data_recipe import data_recipe
from train.fit.self_critical import SelfCritical
from train.model.decoder import CaptionDecoder
from train.step.cuda.graphs import GraphedSteps, graph_length
from train.step.cuda.objective import CudaObjective
from train.step.cuda.step_inputs import StepInputs
from train.step.dropout import draw_masks
from train.step.objective import flat_parameters, objective_for, product_dtype
from train.step.packed_batch import PackedBatch, gather_packed, pack
from train.step.processes.group import Processes
from train.step.processes.launch import ProcessesError
from train.step.update.optimizer import FlatAdamW, learning_rate
from train.step.update.weight_average import WeightAverage

# Photos that BatchNorm's statistics are computed from, for averaged weights: a tenth of a second.
_STATISTICS_PHOTOS = 8192
# Captions validated at a time: enough to keep a GPU busy. At COCO's size their logits take 150 MB.
_GPU_VALIDATION_CAPTIONS = 512


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did. Epochs and steps count from 0."""

    epoch: int
    step: int  # within the epoch
    steps: int  # in every epoch of this kind, cross-entropy or self-critical
    captions: int
    # Scalar on the device: mean cross-entropy per target token; self-critical: minus the reward.
    loss: Tensor


class Trainer:
    """Trains a decoder in place.

    All randomness follows from the seed, the epoch and the step. Training that is interrupted and
    continued from the same state therefore reaches the same weights.
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
        processes: Processes | None = None,
    ) -> None:
        """vocabulary: the words of the captions, which self-critical epochs need. precision: of the
        fast path's matrix products: `auto`, `float32` or `bfloat16`. plain: use the readable
        reference (`CaptionDecoder.loss` and autograd, in float32) instead of the fast path.
        processes: those that train this decoder together, each with such a trainer.
        """
        recipe = data_recipe(recipe, len(captions))
        self.decoder = decoder
        self.captions = captions
        self.recipe = recipe
        self.seed = seed
        device = captions.device
        self.parameters = flat_parameters(decoder)
        largest_batch = min(recipe.batch_size, len(captions))
        self._inputs = StepInputs(largest_batch, device)
        numbers = self._inputs.numbers
        self.average: WeightAverage | None = None
        if recipe.average_decay:
            self.average = WeightAverage(self.parameters, recipe.average_decay, numbers[2])
        self.objective = objective_for(
            decoder,
            self.parameters,
            dtype=product_dtype(device, precision),
            label_smoothing=recipe.label_smoothing,
        )
        self.optimizer = self._make_optimizer(numbers[1])
        self._order: WindowedOrder | None = None  # of captions whose features are streamed
        if captions.stream is not None:
            photos = captions.stream.held.photos
            self._order = WindowedOrder(
                np.searchsorted(photos, captions.feature_rows).astype(np.int32),
                len(photos),
                captions.stream.layout,
                recipe.batch_size,
                captions.lengths,
            )
        self._vocabulary = vocabulary
        self._self_critical: SelfCritical | None = None  # made before its first epoch
        self._plain = plain
        self._processes = processes
        self._batches = 0  # a checksum of those that several processes have gone through
        self.graphs: GraphedSteps | None = None
        if device.type == "cuda" and not plain:
            # A sum over processes is no part of a graph, so neither is the optimizer then.
            step = self._gather_and_update if processes is None else self._gather_and_differentiate
            self.graphs = GraphedSteps(step, lambda: self.objective.generation)
            assert isinstance(self.objective, CudaObjective)
            longest = graph_length(int(captions.lengths.max()))
            own_batch = -(-largest_batch // (1 if processes is None else processes.count))
            self.objective.reserve(own_batch, longest)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[StepResult]:
        """Train an epoch from `first_step` on, by cross-entropy or, if self-critical, by reward.

        Raises ProcessesError if another process has ended or has other weights afterwards.
        """
        rewarded = epoch >= self.recipe.epochs
        train = self._self_critical_epoch if rewarded else self._cross_entropy_epoch
        if self._processes is None:
            return train(epoch, first_step)
        return self._epoch_together(self._processes, epoch, train(epoch, first_step))

    def _epoch_together(
        self, processes: Processes, epoch: int, steps: Iterator[StepResult]
    ) -> Iterator[StepResult]:
        processes.in_steps = True
        for number, step in enumerate(steps):
            if not number:
                self._check_batches(processes)
            yield step
        self._check_batches(processes)
        same = processes.are_equal(self._tensors())
        processes.in_steps = False
        if not same:
            raise ProcessesError(
                f"the weights of the {processes.count} processes differ after epoch {epoch + 1}; "
                "they need machines of one kind, the same versions and as many threads each"
            )

    def _check_batches(self, processes: Processes) -> None:
        """Raise ProcessesError unless all have gone through the same batches.

        Otherwise their weights would be the same, and yet wrong.
        """
        if not processes.agree([self._batches]):
            raise ProcessesError("the processes go through the captions in different orders")

    def _cross_entropy_epoch(self, epoch: int, first_step: int) -> Iterator[StepResult]:
        captions, recipe = self.captions, self.recipe
        count = captions.views if recipe.random_views else 1
        if self._order is None:
            batches = epoch_batches(
                captions.lengths, recipe.batch_size, seed=self.seed, epoch=epoch
            )
            steps = len(batches)
            views = epoch_views(len(captions), count, seed=self.seed, epoch=epoch)
            chosen_steps: Iterator[tuple[NDArray[np.int64], NDArray[np.int64] | None]] = (
                (chosen, None if views is None else views[chosen])
                for chosen in batches[first_step:]
            )
        else:
            steps = len(self._order)
            chosen_steps = self._streamed(self._order, epoch, count, first_step)
        for step, (chosen, chosen_views) in enumerate(chosen_steps, first_step):
            position = epoch * steps + step
            loss = self._step(chosen, chosen_views, position, recipe.epochs * steps)
            yield StepResult(epoch, step, steps, len(chosen), loss)

    def _streamed(
        self, order: WindowedOrder, epoch: int, views: int, first_step: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64] | None]]:
        """The steps of an epoch from `first_step` on, each when its photos are in memory."""
        assert self.captions.stream is not None
        windows = order.windows(seed=self.seed, epoch=epoch, views=views, first_step=first_step)
        with contextlib.closing(self.captions.stream.through(windows)) as ready:
            for window in ready:
                yield from window.steps

    def _self_critical_epoch(self, epoch: int, first_step: int) -> Iterator[StepResult]:
        recipe = self.recipe
        if self._self_critical is None:
            assert self._vocabulary is not None
            self._self_critical = SelfCritical(
                self.decoder,
                self.objective,
                self.captions,
                self._vocabulary,
                samples=recipe.self_critical_samples,
                random_views=recipe.random_views,
                anchor=recipe.self_critical_anchor,
                processes=self._processes,
            )
        if epoch == recipe.epochs and not first_step:
            self._restart_from_average()
        self.optimizer.set_rate(recipe.self_critical_rate)
        steps, batches = self._self_critical_steps(self._self_critical, epoch, first_step)
        for step, (photos, views) in enumerate(batches, first_step):
            position = (epoch - recipe.epochs) * steps + step
            count, reward = self._self_critical.gradients(
                photos, views, _step_seed(self.seed + 1, position)
            )
            if self._processes is not None:
                self._batches = zlib.crc32(photos.tobytes() + views.tobytes(), self._batches)
                self._processes.add_up(self.parameters, reward)
            if self.average is not None:
                self.average.set_step(position)
            self._apply(count)
            yield StepResult(
                epoch, step, steps, len(photos) * recipe.self_critical_samples, -reward
            )

    def _self_critical_steps(
        self, training: SelfCritical, epoch: int, first_step: int
    ) -> tuple[int, Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
        """(steps of an epoch, the photos and their views of each from `first_step` on)."""
        size = self.recipe.self_critical_photos
        stream = self.captions.stream
        if stream is None:
            batches = training.epoch_batches(size, seed=self.seed, epoch=epoch)
            return len(batches), iter(batches[first_step:])
        photos = stream.held.photos
        every = np.arange(len(photos), dtype=np.int32)
        order = WindowedOrder(every, len(photos), replace(stream.layout, passes=1), size)
        count = self.captions.views if self.recipe.random_views else 1
        return len(order), (
            (photos[chosen], np.full(len(chosen), self.captions.full_view) if v is None else v)
            for chosen, v in self._streamed(order, epoch, count, first_step)
        )

    def _restart_from_average(self) -> None:
        """Replace the weights by their average, and the optimizer by a new one."""
        if self.average is not None:
            self.average.take()
            self._update_batchnorm_statistics()
        self.optimizer = self._make_optimizer(None)

    def _step(
        self,
        chosen: NDArray[np.int64],
        views: NDArray[np.int64] | None,
        position: int,
        steps: int,
    ) -> Tensor:
        """Train one batch of captions. position: of this step among all `steps` of training by
        cross-entropy. Returns the loss.
        """
        recipe, seed = self.recipe, _step_seed(self.seed, position)
        rate = learning_rate(recipe, position, steps)
        if self.graphs is not None:
            return self._graphed_step(self.graphs, chosen, views, rate, position, seed)
        self.optimizer.set_rate(rate)
        if self.average is not None:
            self.average.set_step(position)
        if self._processes is not None:
            return self._step_together(self._processes, chosen, views, seed)
        batch = self.captions.batch(chosen, views)
        if self._plain:
            return self._plain_update(batch, seed)
        if self.captions.device.type == "cuda":  # dropout masks are drawn on the device
            torch.cuda.manual_seed(seed)
            return self._update(batch, None)
        return self._update(batch, seed)

    def _step_together(
        self,
        processes: Processes,
        chosen: NDArray[np.int64],
        views: NDArray[np.int64] | None,
        seed: int,
    ) -> Tensor:
        """Train one batch, of which each process computes its share."""
        captions = self.captions
        on_cpu = captions.device.type == "cpu"
        chosen, views = self._in_shared_order(chosen, views)
        share, idle = processes.share_of(len(chosen))
        batch = captions.batch(chosen[share], views[share])
        packed = dataclasses.replace(
            pack(batch, round_up=on_cpu),
            features=captions.photo_features(captions.feature_rows[chosen], views),
            share=share,
        )
        if not on_cpu:
            torch.cuda.manual_seed(seed)
        loss = processes.add_up(
            self.parameters, self._differentiate(packed, seed if on_cpu else None, idle)
        )
        count = torch.tensor(int(captions.lengths[chosen].sum()), device=captions.device)
        self._apply(count)
        return loss / count

    def _in_shared_order(
        self, chosen: NDArray[np.int64], views: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """A batch in the order in which it is shared, longest first, and the photos' views."""
        order = np.argsort(-self.captions.lengths[chosen], kind="stable")
        if views is None:
            views = np.full(len(chosen), self.captions.full_view)
        chosen, views = chosen[order], views[order]
        self._batches = zlib.crc32(chosen.tobytes() + views.tobytes(), self._batches)
        return chosen, views

    def _graphed_step(
        self,
        graphs: GraphedSteps,
        chosen: NDArray[np.int64],
        views: NDArray[np.int64] | None,
        rate: float,
        position: int,
        seed: int,
    ) -> Tensor:
        """Send this step's inputs to the device in one copy and launch a graph that reads them."""
        processes = self._processes
        if processes is not None:
            chosen, views = self._in_shared_order(chosen, views)
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
        if processes is None:
            return graphs.run(*inputs, graph_length(int(lengths.max())))
        own_lengths = lengths[processes.share_of(len(chosen))[0]]
        loss = graphs.run(*inputs, graph_length(int(own_lengths.max())))
        loss, count = processes.add_up(self.parameters, loss), self._inputs.numbers[0]
        self._apply(count)
        return loss / count

    def _gather_and_update(self, captions: Tensor, views: Tensor, length: int) -> Tensor:
        assert isinstance(self.objective, CudaObjective)
        kernels = self.objective.kernels
        packed = gather_packed(self.captions, kernels, captions, views, length)
        return self._update_packed(packed, self._inputs.numbers[0], None)

    def _gather_and_differentiate(self, captions: Tensor, views: Tensor, length: int) -> Tensor:
        """Compute the gradients of this process's share. Returns the sum of its losses."""
        assert isinstance(self.objective, CudaObjective)
        assert self._processes is not None
        share, idle = self._processes.share_of(len(captions))
        packed = gather_packed(
            self.captions, self.objective.kernels, captions, views, length, share
        )
        return self._differentiate(packed, None, idle)

    def _differentiate(self, packed: PackedBatch, seed: int | None, idle: bool) -> Tensor:
        """As `_update_packed`, without the update: the sum of the losses. idle: they count for
        nothing, because other processes compute them.
        """
        assert self._processes is not None
        masks = draw_masks(
            self.decoder.config, packed, self.objective.dtype, seed, self._processes.rank
        )
        weights = torch.zeros(len(packed.words), device=packed.words.device) if idle else None
        return self.objective.loss_and_gradients(packed, masks, weights=weights)

    def _update(self, batch: Batch, seed: int | None) -> Tensor:
        packed = pack(batch, round_up=self.captions.device.type == "cpu")
        return self._update_packed(packed, packed.count(), seed)

    def _update_packed(self, packed: PackedBatch, count: Tensor, seed: int | None) -> Tensor:
        """count: number of targets. seed: of this step's dropout, or None if the device's generator
        is seeded already.
        """
        masks = draw_masks(self.decoder.config, packed, self.objective.dtype, seed)
        loss = self.objective.loss_and_gradients(packed, masks)
        self._apply(count)
        return loss / count

    def _plain_update(self, batch: Batch, seed: int) -> Tensor:
        torch.manual_seed(seed)  # for dropout
        self.decoder.train()
        # A single row has no variance: a last batch of one caption uses the running statistics.
        self.decoder.normalize.train(len(batch.targets) > 1)
        self.parameters.gradients.zero_()
        with _without_tf32(), warnings.catch_warnings():
            # Autograd warns that transposed gradients may be slow. Here they are intended.
            warnings.filterwarnings("ignore", message="grad and param do not obey")
            # cuDNN warns that the LSTM's weights would be faster in a buffer of its own.
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
            loss = self.decoder.loss(batch, self.recipe.label_smoothing)
            loss.backward()
        self._apply(torch.ones((), device=loss.device))
        return loss.detach()

    def _apply(self, count: Tensor) -> None:
        low = self.objective.low if isinstance(self.objective, CudaObjective) else None
        self.optimizer.step(count, self.average, low)

    def _make_optimizer(self, rate: Tensor | None) -> FlatAdamW:
        kernels = self.objective.kernels if isinstance(self.objective, CudaObjective) else None
        return FlatAdamW(self.parameters, self.recipe, rate=rate, kernels=kernels)

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """A context in which the decoder is as it is to be evaluated and saved: in eval mode, and
        with the averaged weights if the recipe has an average.
        """
        self.decoder.eval()
        if self.average is None:
            yield
            return
        normalize = self.decoder.normalize
        saved = [buffer.clone() for buffer in normalize.buffers()]
        try:
            with self.average.in_place():
                self._update_batchnorm_statistics()
                yield
        finally:
            for buffer, value in zip(normalize.buffers(), saved, strict=True):
                buffer.copy_(value)

    @contextlib.contextmanager
    def weights_of(self, other: CaptionDecoder) -> Iterator[None]:
        """A context in which the decoder is in eval mode and has another decoder's weights.

        Raises RuntimeError if the other has other sizes.
        """
        self.decoder.eval()
        tensors = [self.parameters.values, *self.decoder.buffers()]
        saved = [tensor.clone() for tensor in tensors]
        try:
            self.decoder.load_state_dict(other.state_dict())
            yield
        finally:
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)

    @torch.no_grad()
    def _update_batchnorm_statistics(self) -> None:
        """Recompute BatchNorm's statistics from training photos, for the weights now in place.

        The running statistics belong to the weights of training. The averaged weights project
        photos to a smaller spread. Batches of one caption train with the running statistics, which
        then never change, and so these are kept.
        """
        captions, normalize = self.captions, self.decoder.normalize
        if min(self.recipe.batch_size, len(captions)) == 1:
            return
        random = np.random.default_rng((self.seed, 3))
        count = min(_STATISTICS_PHOTOS, len(captions))
        rows = captions.feature_rows[random.permutation(len(captions))[:count]]
        views = np.full(count, captions.full_view)
        if self.recipe.random_views:
            views = random.integers(captions.views, size=count)
        projected = self.decoder.project(captions.photo_features(rows, views).float())
        assert normalize.running_mean is not None
        assert normalize.running_var is not None
        normalize.running_mean.copy_(projected.mean(0))
        normalize.running_var.copy_(projected.var(0))

    # No inference mode: the objective's buffers may grow here, and training uses them later.
    @torch.no_grad()
    def validation_loss(self, captions: CaptionSet) -> float:
        """Mean cross-entropy per target token of all captions, without dropout and smoothing."""
        self.decoder.eval()
        total, tokens = torch.zeros((), device=captions.device, dtype=torch.float64), 0
        # Captions of similar length share a batch, which saves padding and leaves the sum as it is.
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

    def start_together(self) -> None:
        """Take over the weights and the optimizer of the process that leads."""
        assert self._processes is not None
        self._processes.send_from_first([*self._tensors(), *self.decoder.buffers()])

    def _tensors(self) -> list[Tensor]:
        """All float32 numbers that follow from training, on the device."""
        average = [] if self.average is None else [self.average.values]
        buffers = [each for each in self.decoder.buffers() if each.is_floating_point()]
        return [self.parameters.values, *average, *self.optimizer.tensors, *buffers]

    def is_finite(self) -> bool:
        """Whether no weight, averaged weight or BatchNorm statistic is infinite or NaN."""
        tensors = [self.parameters.values, *self.decoder.buffers()]
        if self.average is not None:
            tensors.append(self.average.values)
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def state(self) -> dict[str, Any]:
        """Copies of weights, optimizer and average, as plain tensors on the CPU for `load`."""
        return {
            "parameters": self.parameters.named(self.parameters.values),
            "buffers": {n: b.cpu().clone() for n, b in self.decoder.named_buffers()},
            "optimizer": self.optimizer.state(),
            "average": self.average.state() if self.average else None,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises KeyError, RuntimeError or TypeError if the state belongs to another decoder."""
        self.parameters.load(state["parameters"], self.parameters.values)
        for name, buffer in self.decoder.named_buffers():
            buffer.copy_(state["buffers"][name])
        self.optimizer.load(state["optimizer"])
        if self.average is not None:
            self.average.load(state["average"])


def _without_tf32() -> AbstractContextManager[None]:
    """Keep cuDNN's LSTM from rounding float32 to TF32, which has a mantissa of ten bits."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    return flags


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
