"""Scores after every epoch: greedy captions of the whole validation set, against its references.

The references are tokenized and counted once; after that an epoch's captions cost a greedy search
and some tens of milliseconds. The scores are those of `train.scores.metrics.score(…, java=False)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cache.store import DONE, FeatureCache
from train.captions.caption_set import TrainingSetError
from train.captions.views import view_features
from train.captions.vocabulary import Vocabulary
from train.config import FULL, SearchConfig
from train.model.decoder import CaptionDecoder
from train.scores.ngrams import ReferenceNgrams, number_words
from train.scores.scoring_tokens import treebank_line
from train.search.hypotheses import search

_ROWS = 4096  # photos whose features are in memory at once
_GPU_BATCH, _CPU_BATCH = 1024, 128  # photos captioned at once


@dataclass(frozen=True, eq=False)
class ValidationScores:
    """Corpus scores of one caption a photo, as fractions; `metrics.Scores` in short."""

    bleu_4: float
    cider: float
    distinct: int  # different captions; one, or a few, means the decoder has collapsed
    ciders: NDArray[np.float64] = field(repr=False)  # (N,) of each photo

    @property
    def count(self) -> int:
        """Captions scored."""
        return len(self.ciders)

    def as_dict(self) -> dict[str, float]:
        names = ("bleu_4", "cider", "distinct", "count")
        return {name: getattr(self, name) for name in names}


class ValidationScorer:
    """Scores captions of always the same photos.

    references: for each photo its raw reference captions, at least one.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._photos = np.arange(len(references))
        self._numbers: dict[str, int] = {}
        lines = (treebank_line(text) for texts in references for text in texts)
        firsts = np.cumsum([0, *map(len, references)])
        self._ngrams = ReferenceNgrams(number_words(lines, self._numbers), firsts)

    def score(self, captions: Sequence[str]) -> ValidationScores:
        """Scores of one raw caption for each photo, in the order of the references."""
        # Words of no reference get numbers, too: how often each stands in a caption counts.
        lines = number_words(map(treebank_line, captions), dict(self._numbers))
        bleu, cider = self._ngrams.score(self._photos, lines)
        return ValidationScores(
            bleu_4=float(bleu.bleu()[3]),
            cider=float(cider.mean()),
            distinct=len(set(captions)),
            ciders=cider,
        )


class Validation:
    """The photos of a cache that have captions, to be captioned and scored again and again."""

    def __init__(
        self,
        cache: FeatureCache,
        *,
        rows: NDArray[np.int64] | None = None,
        view: str = FULL,
    ) -> None:
        """rows: of the cache, those held out; None: all. view: `full` or `mean`.

        Raises TrainingSetError where no extracted photo has captions.
        """
        texts = cache.captions.by_row(len(cache))
        usable = cache.rows_with(DONE) if rows is None else rows[cache.status[rows] == DONE]
        self.rows = np.array([row for row in usable.tolist() if texts[row]], np.int64)
        if not len(self.rows):
            raise TrainingSetError(f"{cache.path}: no captions of extracted photos to validate on")
        self._cache, self._view = cache, view
        self._scorer = ValidationScorer([texts[row] for row in self.rows.tolist()])

    @property
    def identity(self) -> str:
        """Of the photos and their references, up to which of them are held out."""
        cache = self._cache
        return f"{cache.photos_sha256} {cache.captions_sha256} {len(self.rows)}"

    def captions(
        self, decoder: CaptionDecoder, vocabulary: Vocabulary, config: SearchConfig | None = None
    ) -> list[str]:
        """A caption for each of `rows`; greedy unless `config` says otherwise."""
        config = config or SearchConfig(beam_size=1)
        device = next(decoder.parameters()).device
        training = decoder.training
        decoder.eval()
        batch_size = _GPU_BATCH if device.type == "cuda" else _CPU_BATCH
        captions: list[str] = []
        for start in range(0, len(self.rows), _ROWS):
            rows = self.rows[start : start + _ROWS]
            features = view_features(self._cache, rows, self._view).to(device)
            found = search(decoder, features, config, batch_size=batch_size)
            captions.extend(vocabulary.decode(hypothesis.words) for hypothesis in found)
        decoder.train(training)
        return captions

    def score(
        self, decoder: CaptionDecoder, vocabulary: Vocabulary, config: SearchConfig | None = None
    ) -> ValidationScores:
        """The scores of `captions`. The decoder is left in the mode it was in."""
        return self._scorer.score(self.captions(decoder, vocabulary, config))
