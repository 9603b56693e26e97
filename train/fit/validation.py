"""Scores after every epoch: captions of all validation photos against their references.

The references are tokenized and counted once. After that, an epoch costs the search and some tens
of milliseconds for the scores, which equal those of `train.scores.metrics.score(…, java=False)`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cache.store import DONE, FeatureCache
from train.captions.caption_set import TrainingSetError
from train.captions.script import TREEBANK
from train.captions.views import view_features
from train.captions.vocabulary import Vocabulary
from train.config import FULL, SearchConfig
from train.model.decoder import CaptionDecoder
from train.scores.degenerate import degenerate
from train.scores.ngrams import ReferenceNgrams, number_words
from train.scores.scoring_tokens import scoring_line
from train.search.hypotheses import search

_CHUNK_ROWS = 4096  # photos whose features are in memory at a time
_SIDES: tuple[Literal["left"], Literal["right"]] = ("left", "right")
_GPU_BATCH, _CPU_BATCH = 1024, 128  # photos captioned at a time


@dataclass(frozen=True, eq=False)
class ValidationScores:
    """Corpus scores as fractions, for one caption per photo: some of those in `metrics.Scores`."""

    bleu_4: float
    cider: float
    distinct: int  # number of different captions; very few mean that the decoder has collapsed
    ciders: NDArray[np.float64] = field(repr=False)  # (N,) of each photo
    degenerate: str | None = None  # why the captions mean little, if they do

    @property
    def count(self) -> int:
        """Number of captions scored."""
        return len(self.ciders)

    def as_dict(self) -> dict[str, float]:
        names = ("bleu_4", "cider", "distinct", "count")
        return {name: getattr(self, name) for name in names}


class ValidationScorer:
    """Scores captions of the same photos many times."""

    def __init__(self, references: Sequence[Sequence[str]], tokenizer: str = TREEBANK) -> None:
        """references: the raw reference captions of each photo, at least one. tokenizer: what
        splits them and the captions that are scored.
        """
        self._tokenizer = tokenizer
        self._photos = np.arange(len(references))
        self._numbers: dict[str, int] = {}
        lines = (scoring_line(text, tokenizer) for texts in references for text in texts)
        photo_offsets = np.cumsum([0, *map(len, references)])
        self._ngrams = ReferenceNgrams(number_words(lines, self._numbers), photo_offsets)

    def score(self, captions: Sequence[str]) -> ValidationScores:
        """Score one raw caption for each photo, in the order of the references."""
        # Words that no reference has get numbers too: CIDEr-D counts how often a caption says each.
        spoken = (scoring_line(caption, self._tokenizer) for caption in captions)
        lines = number_words(spoken, dict(self._numbers))
        bleu, cider = self._ngrams.score(self._photos, lines)
        return ValidationScores(
            bleu_4=float(bleu.bleu()[3]),
            cider=float(cider.mean()),
            distinct=len(set(captions)),
            ciders=cider,
            degenerate=degenerate([caption.split() for caption in captions]),
        )


class ValidationPhotos:
    """Captions and scores the photos of a cache that have reference captions, many times."""

    def __init__(
        self,
        cache: FeatureCache,
        *,
        rows: NDArray[np.int64] | None = None,
        view: str = FULL,
    ) -> None:
        """rows: the held-out rows of the cache, or None for all. view: `full` or `mean`.

        Raises TrainingSetError if no extracted photo has captions.
        """
        usable = cache.rows_with(DONE) if rows is None else rows[cache.status[rows] == DONE]
        self.rows = usable[np.isin(usable, cache.captions.rows)].astype(np.int64)
        if not len(self.rows):
            raise TrainingSetError(f"{cache.path}: no captions of extracted photos to validate on")
        self._cache, self._view = cache, view

    @functools.cached_property
    def _scorer(self) -> ValidationScorer:
        """Made for the first scores, so that training begins without it."""
        table = self._cache.captions
        starts, stops = (np.searchsorted(table.rows, self.rows, side) for side in _SIDES)
        texts = [table.texts[start:stop] for start, stop in zip(starts, stops, strict=True)]
        return ValidationScorer(texts, table.tokenizer)

    @property
    def identity(self) -> str:
        """Tells validation sets apart by their caches and by the rows that are validated on."""
        rows = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
        return f"{self._identity_without_rows} {rows}"

    @property
    def _identity_without_rows(self) -> str:
        """The identity as 0.1.0 wrote it, with the number of rows alone."""
        cache = self._cache
        return f"{cache.photos_sha256} {cache.captions_sha256} {len(self.rows)}"

    @functools.cached_property
    def content_sha256(self) -> str:
        """Tells what is scored apart: the photos, by their bytes, or by their ids where those are
        not known, with their captions and how these are tokenized. Not the cache, nor the order.
        """
        table, digests, ids = self._cache.captions, self._cache.digests, self._cache.image_ids
        text, offsets = table.texts.text, table.texts.offsets
        starts, stops = (np.searchsorted(table.rows, self.rows, side) for side in _SIDES)
        entries = []
        for row, start, stop in zip(
            self.rows.tolist(), starts.tolist(), stops.tolist(), strict=True
        ):
            digest = digests[row].tobytes()
            ends = offsets[start : stop + 1]
            captions = text[ends[0] : ends[-1]].tobytes()
            lengths = np.diff(ends).astype("<i8").tobytes()
            entries.append((digest if any(digest) else digest + ids.raw(row), lengths, captions))
        entries.sort()
        whole = hashlib.sha256(table.tokenizer.encode())
        for photo, lengths, captions in entries:
            # With the lengths of all parts, no two sets have the same bytes.
            whole.update(b"%d %d " % (len(photo), len(lengths)) + photo + lengths + captions)
        return whole.hexdigest()

    @property
    def cache_name(self) -> str:
        """The name of the file that they are in."""
        return self._cache.path.name

    def is_recorded_as(self, identity: str) -> bool:
        """Whether a recorded identity is that of these photos, as far as the record tells."""
        return identity in (self.identity, self._identity_without_rows)

    def captions(
        self, decoder: CaptionDecoder, vocabulary: Vocabulary, config: SearchConfig | None = None
    ) -> list[str]:
        """A caption for each of `rows`. config: None for greedy search."""
        config = (config or SearchConfig(beam_size=1)).up_to(vocabulary.longest)
        device = next(decoder.parameters()).device
        training = decoder.training
        decoder.eval()
        batch_size = _GPU_BATCH if device.type == "cuda" else _CPU_BATCH
        captions: list[str] = []
        for start in range(0, len(self.rows), _CHUNK_ROWS):
            rows = self.rows[start : start + _CHUNK_ROWS]
            features = view_features(self._cache, rows, self._view).to(device)
            hypotheses = search(decoder, features, config, batch_size=batch_size)
            captions.extend(vocabulary.decode(hypothesis.words) for hypothesis in hypotheses)
        decoder.train(training)
        return captions

    def score(
        self, decoder: CaptionDecoder, vocabulary: Vocabulary, config: SearchConfig | None = None
    ) -> ValidationScores:
        """Score the captions of `captions`. The decoder stays in the mode it was in."""
        return self._scorer.score(self.captions(decoder, vocabulary, config))
