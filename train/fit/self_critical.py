"""Self-critical training (Rennie et al., 2017): captions are drawn, scored by CIDEr-D, and made
likelier or less likely by how much better than the others of their photo they are.

The baseline of a sample is the mean reward of the photo's other samples, which costs no further
search and is unbiased (Luo, 2020, «A better variant of self-critical sequence training»). Captions
are drawn from the very distribution whose gradient is taken: a photo's features lose the same
numbers to dropout in both, and nothing else is dropped or measured. The gradient is a
cross-entropy's with a weight for each caption: the fast objective computes it as it is.

By the reward alone captions become short and vague: CIDEr-D punishes a wrong colour more than it
rewards a right one, and METEOR falls. The true captions' cross-entropy, at a small weight and with
all the dropout of the epochs before, keeps what they say.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.captions.caption_set import Batch, CaptionSet
from train.captions.vocabulary import END, PAD, SPECIALS, Vocabulary
from train.model.decoder import CaptionDecoder
from train.scores.cider_reward import CiderReward
from train.scores.scoring_tokens import PUNCTUATION
from train.search.rollout import sample
from train.step.dropout import draw_masks
from train.step.objective import Objective
from train.step.packed_batch import pack

_MAX_LENGTH = 20  # words drawn; ten times rarer than one in a hundred captions is longer


class SelfCritical:
    """Draws, scores and differentiates captions of the photos of a caption set.

    The reward reads words as evaluation does: without punctuation. Document frequencies are those
    of the caption set.
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
    ) -> None:
        """samples: drawn for each photo, two or more. anchor: weight of the true captions."""
        self._decoder = decoder
        self._objective = objective
        self._captions = captions
        self._samples = samples
        self._anchor = anchor
        self._by_photo = np.argsort(captions.feature_rows, kind="stable")
        self.photos = np.unique(captions.feature_rows)  # rows of the cache, ascending
        known = [vocabulary.number(mark) for mark in PUNCTUATION]
        self._reward = CiderReward(
            captions.words,
            captions.offsets,
            captions.feature_rows,
            vocab_size=len(vocabulary),
            skipped=[number for number in known if number >= len(SPECIALS)],
        )

    def epoch(
        self, batch_photos: int, *, seed: int, epoch: int
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The photos and their views, (B,) each, of every step of an epoch."""
        random = np.random.default_rng((seed, epoch, 2))
        order = random.permutation(self.photos)
        views = random.integers(self._captions.views, size=len(order))
        return [
            (order[start : start + batch_photos], views[start : start + batch_photos])
            for start in range(0, len(order), batch_photos)
        ]

    def gradients(
        self, photos: NDArray[np.int64], views: NDArray[np.int64], seed: int
    ) -> tuple[Tensor, Tensor]:
        """Put one step's gradients, as a sum over tokens, into the flat buffer.

        Returns the number of tokens behind them, and the samples' mean CIDEr-D (0 to 10).
        """
        generator = torch.Generator(self._captions.device).manual_seed(seed)
        features = self._captions.photo_features(photos, views)
        features = _drop(features, self._decoder.config.feature_dropout, generator)
        self._decoder.eval()
        words = sample(
            self._decoder, features, self._samples, max_length=_MAX_LENGTH, generator=generator
        )
        rewards = self._reward.score(np.repeat(photos, self._samples), words.cpu().numpy())
        advantages = _above_the_others(rewards.reshape(-1, self._samples)).reshape(-1)
        batch, order = _as_batch(features.repeat_interleave(self._samples, 0), words)
        packed = pack(batch, round_up=words.device.type == "cpu")
        of_captions = torch.from_numpy(advantages).float().to(words.device)[order]
        # Filling rows point past the last caption.
        padded = torch.nn.functional.pad(of_captions, (0, len(packed.captions)))
        weights = padded[packed.captions]
        # After the most words `<end>` is not drawn but forced: nothing is to be learned there.
        weights[sum(packed.steps[:_MAX_LENGTH]) :] = 0
        self._objective.loss_and_gradients(packed, weights=weights, training=False, drawn=True)
        count = packed.count()
        if self._anchor:
            self._add_true_captions(photos, views, self._anchor * count, seed)
        return count, torch.tensor(rewards.mean())

    def _add_true_captions(
        self, photos: NDArray[np.int64], views: NDArray[np.int64], weight: Tensor, seed: int
    ) -> None:
        """Add the mean gradient of these photos' captions, times `weight`, to the gradients."""
        rows = self._captions.feature_rows[self._by_photo]
        first, last = (np.searchsorted(rows, photos, side=side) for side in ("left", "right"))
        chosen = np.concatenate(
            [self._by_photo[start:stop] for start, stop in zip(first, last, strict=True)]
        )
        batch = self._captions.batch(chosen, np.repeat(views, last - first))
        on_host = batch.targets.device.type == "cpu"
        packed = pack(batch, round_up=on_host)
        if not on_host:
            torch.cuda.manual_seed(seed)
        config, dtype = self._decoder.config, self._objective.dtype
        masks = draw_masks(config, packed, dtype, seed if on_host else None)
        gradients = self._objective.parameters.gradients
        rewarded = gradients.clone()
        self._objective.loss_and_gradients(packed, masks, training=False)
        gradients.mul_(weight / packed.count()).add_(rewarded)


def _drop(features: Tensor, p: float, generator: torch.Generator) -> Tensor:
    """Features (B, D) of which each number is 0 with probability p, the rest the larger for it."""
    if not p:
        return features
    kept = torch.rand(features.shape, generator=generator, device=features.device) >= p
    return features * kept / (1 - p)


def _above_the_others(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N, K) rewards → each minus the mean of its row's others."""
    count = rewards.shape[1]
    others = (rewards.sum(1, keepdims=True) - rewards) / (count - 1)
    difference: NDArray[np.float64] = rewards - others
    return difference


def _as_batch(features: Tensor, words: Tensor) -> tuple[Batch, Tensor]:
    """Drawn captions (M, T) as a batch, longest first, and the order they are in."""
    order = (words != PAD).sum(1).argsort(descending=True, stable=True)
    targets = words[order]
    inputs = targets[:, :-1]
    return Batch(features[order], inputs.masked_fill(inputs == END, PAD), targets), order
