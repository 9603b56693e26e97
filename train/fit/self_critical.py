"""Self-critical training (Rennie et al., 2017): captions are sampled and scored by CIDEr-D, and
those that beat the other samples of their photo become likelier, the rest less likely.

The baseline of a sample is the mean reward of the photo's other samples. It needs no extra search
and is unbiased (Luo, 2020, «A better variant of self-critical sequence training»). The gradient is
taken of the very distribution that captions are sampled from: both see the same dropout of the
photo's features, there is no other dropout, and BatchNorm uses its running statistics. The gradient
is that of a cross-entropy with a weight for each caption, so the fast objective computes it as is.

With the reward alone, captions become short and vague: CIDEr-D punishes a wrong colour more than it
rewards a right one, and METEOR falls. To prevent that, the cross-entropy of the true captions is
added with a small weight, and with all the dropout of ordinary training.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.captions.caption_set import Batch, CaptionSet
from train.captions.vocabulary import END, PAD, Vocabulary
from train.model.decoder import CaptionDecoder
from train.scores.cider_reward import CiderReward
from train.scores.scoring_tokens import is_punctuation
from train.search.rollout import sample
from train.step.dropout import draw_masks
from train.step.objective import Objective
from train.step.packed_batch import pack
from train.step.processes.group import Processes
from train.torch_import import seeded_generator

# Words in a sample; of COCO's captions about one in a thousand is longer. Where the captions are
# long, a sample has as many words as they have.
_MAX_LENGTH = 20
# The true captions of a step are computed in parts of at most this many captions for each photo, or
# of the least number. Photos with five captions make one part; a photo may have thousands.
_TRUE_CAPTIONS_PER_PHOTO = 8
_LEAST_TRUE_CAPTIONS = 64


class SelfCritical:
    """Samples and scores captions for the photos of a caption set, and computes the gradient.

    As in evaluation, the reward ignores punctuation. Its document frequencies are those of the
    caption set.
    """

    def __init__(
        self,
        decoder: CaptionDecoder,
        objective: Objective,
        captions: CaptionSet,
        vocabulary: Vocabulary,
        *,
        samples: int,
        anchor: float,
        random_views: bool = True,
        processes: Processes | None = None,
    ) -> None:
        """samples: captions sampled for each photo, at least two. anchor: weight of the true
        captions' cross-entropy. random_views: train on a random view of each photo, not always on
        the full one. processes: those that train together, each on its share of the photos.
        """
        self._decoder = decoder
        self._processes = processes
        self._objective = objective
        self._captions = captions
        self._samples = samples
        self._anchor = anchor
        self._random_views = random_views
        self._max_length = max(_MAX_LENGTH, vocabulary.longest)
        self._by_photo = np.argsort(captions.feature_rows, kind="stable")
        self.photos = np.unique(captions.feature_rows)  # rows of the cache, ascending
        marks = [w for w in vocabulary.words if is_punctuation(w, vocabulary.tokenizer)]
        self._reward = CiderReward(
            captions.words,
            captions.offsets,
            captions.feature_rows,
            vocab_size=len(vocabulary),
            skipped=[vocabulary.number(mark) for mark in marks],
        )

    def epoch_batches(
        self, batch_photos: int, *, seed: int, epoch: int
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The photos (rows of the cache) and their views for each step of an epoch: (B,) each."""
        random = np.random.default_rng((seed, epoch, 2))
        order = random.permutation(self.photos)
        views = np.full(len(order), self._captions.full_view)
        if self._random_views:
            views = random.integers(self._captions.views, size=len(order))
        return [
            (order[start : start + batch_photos], views[start : start + batch_photos])
            for start in range(0, len(order), batch_photos)
        ]

    def gradients(
        self, photos: NDArray[np.int64], views: NDArray[np.int64], seed: int
    ) -> tuple[Tensor, Tensor]:
        """Write one step's gradients, summed over tokens, into the flat buffer.

        photos: (B,) rows of the cache; views: (B,). Returns the number of tokens and the mean
        CIDEr-D of the samples (0 to 10). With several processes, the gradients are those of this
        process's share, and what is returned is of all photos.
        """
        idle = False
        if self._processes is not None:
            share, idle = self._processes.share_of(len(photos))
            photos, views = photos[share], views[share]
            seed = self._processes.own_seed(seed)
        generator = seeded_generator(seed, self._captions.device)
        features = self._captions.photo_features(photos, views)
        features = _dropout(features, self._decoder.config.feature_dropout, generator)
        self._decoder.eval()
        words = sample(
            self._decoder,
            features,
            self._samples,
            max_length=self._max_length,
            generator=generator,
        )
        rewards = self._reward.score(np.repeat(photos, self._samples), words.cpu().numpy())
        advantages = _advantages(rewards.reshape(-1, self._samples)).reshape(-1)
        batch, order = _as_batch(features.repeat_interleave(self._samples, 0), words)
        packed = pack(batch, round_up=words.device.type == "cpu")
        caption_weights = torch.from_numpy(advantages).float().to(words.device)[order]
        # Padding rows of the packed batch point past the last caption; they get weight 0.
        padded = torch.nn.functional.pad(caption_weights, (0, len(packed.captions)))
        weights = padded[packed.captions]
        # After `max_length` words `<end>` is forced, not sampled, so it has no gradient.
        weights[sum(packed.steps[: self._max_length]) :] = 0
        self._objective.loss_and_gradients(packed, weights=weights, training=False, drawn=True)
        count, reward = packed.count(), torch.tensor(rewards.mean())
        if self._processes is not None:
            count, reward = self._of_all(count, rewards, idle)
        if self._anchor:
            self._add_true_captions(photos, views, self._anchor * count, seed, idle)
        if idle:
            self._objective.parameters.gradients.zero_()
        return count, reward

    def _of_all(
        self, count: Tensor, rewards: NDArray[np.float64], idle: bool
    ) -> tuple[Tensor, Tensor]:
        """The tokens and the mean reward of all processes. idle: this one's photos do not count."""
        assert self._processes is not None
        own = [0.0, 0.0, 0.0] if idle else [float(count), float(rewards.sum()), rewards.size]
        tokens, reward, samples = self._processes.sums(own)
        return count.new_tensor(int(tokens)), torch.tensor(reward / samples)

    def _add_true_captions(
        self,
        photos: NDArray[np.int64],
        views: NDArray[np.int64],
        weight: Tensor,
        seed: int,
        idle: bool,
    ) -> None:
        """Add the gradient of the mean loss of these photos' captions, times `weight`. With several
        processes, this is the part of these captions in the mean over those of all processes.

        Nothing depends on which captions share a part, since BatchNorm uses its running statistics.
        """
        rows = self._captions.feature_rows[self._by_photo]
        first, last = (np.searchsorted(rows, photos, side=side) for side in ("left", "right"))
        chosen = np.concatenate(
            [self._by_photo[start:stop] for start, stop in zip(first, last, strict=True)]
        )
        order = np.argsort(-self._captions.lengths[chosen], kind="stable")  # saves padding
        chosen, chosen_views = chosen[order], np.repeat(views, last - first)[order]
        size = max(_TRUE_CAPTIONS_PER_PHOTO * len(photos), _LEAST_TRUE_CAPTIONS)
        on_host = weight.device.type == "cpu"
        if not on_host:
            torch.cuda.manual_seed(seed)
        gradients = self._objective.parameters.gradients
        rewarded = gradients.clone()
        count = torch.zeros((), dtype=torch.int64, device=weight.device)
        for number, start in enumerate(range(0, len(chosen), size)):
            part = slice(start, start + size)
            packed = pack(self._captions.batch(chosen[part], chosen_views[part]), round_up=on_host)
            masks = draw_masks(
                self._decoder.config,
                packed,
                self._objective.dtype,
                seed + number if on_host else None,
            )
            before = gradients.clone() if start else None
            self._objective.loss_and_gradients(packed, masks, training=False)
            if before is not None:
                gradients.add_(before)
            count += packed.count()
        if self._processes is not None:
            (tokens,) = self._processes.sums([0.0 if idle else float(count)])
            count.fill_(int(tokens))
        gradients.mul_(weight / count).add_(rewarded)


def _dropout(features: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Dropout of (B, D) features from a generator of its own, which torch's dropout cannot take."""
    if not p:
        return features
    kept = torch.rand(features.shape, generator=generator, device=features.device) >= p
    return features * kept / (1 - p)


def _advantages(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, K) rewards → each minus the mean of the others in its row."""
    count = rewards.shape[1]
    others = (rewards.sum(1, keepdims=True) - rewards) / (count - 1)
    advantages: NDArray[np.float64] = rewards - others
    return advantages


def _as_batch(features: Tensor, words: Tensor) -> tuple[Batch, Tensor]:
    """Sampled captions (M, T) as a batch, longest first, and the place of each in `words`, (M,)."""
    order = (words != PAD).sum(1).argsort(descending=True, stable=True)
    targets = words[order]
    inputs = targets[:, :-1]
    return Batch(features[order], inputs.masked_fill(inputs == END, PAD), targets), order
