"""What a gallery shows of predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.captioner.captioner import Captioner
from pipeline.captioner.predictions import Caption, Prediction
from pipeline.gallery.gallery import Gallery, Piece, ShownCaption, ShownPhoto
from train.captions.vocabulary import Vocabulary
from train.captions.word_places import word_places
from train.config import SearchConfig


def shown_caption(caption: Caption, vocabulary: Vocabulary) -> ShownCaption:
    """A caption of a model, its words with their probabilities.

    Its confidence is the geometric mean of the probabilities of its words and of its end.
    """
    places = word_places(caption.words, caption.caption, vocabulary)
    pieces: list[Piece] = []
    end = 0
    for place, log_prob in zip(places, caption.log_probs, strict=False):
        if place is not None:
            pieces.append(Piece(caption.caption[end : place[1]], math.exp(min(0.0, log_prob))))
            end = place[1]
    if end < len(caption.caption):
        pieces.append(Piece(caption.caption[end:]))
    mean = sum(caption.log_probs) / max(1, len(caption.log_probs))
    return ShownCaption(tuple(pieces), math.exp(min(0.0, mean)))


def shown_prediction(
    prediction: Prediction,
    vocabulary: Vocabulary,
    references: Sequence[str] = (),
    cider: float | None = None,
) -> ShownPhoto:
    """A prediction with all captions that were found. cider: of the photo, a fraction."""
    captions = (*prediction.captions, *prediction.others)
    return ShownPhoto(
        prediction.path,
        tuple(shown_caption(caption, vocabulary) for caption in captions),
        prediction.error,
        tuple(references),
        None if cider is None else 100 * cider,
    )


def model_name(model: Path) -> str:
    """The end of a model's path, without the folders above it, which are nobody's concern."""
    return "/".join(part for part in model.parts[-2:] if part != "/")


def search_in_words(search: SearchConfig) -> str:
    """How captions were found, for people."""
    if search.sample:
        return "words drawn at random"
    return "greedy search" if search.beam_size == 1 else f"search with {search.beam_size} beams"


def others_of(search: SearchConfig) -> int:
    """How many more captions of its beams a search may show."""
    return 0 if search.sample else max(0, search.beam_size - search.captions)


def finish(gallery: Gallery, model: Path, captioner: Captioner) -> str:
    """Write the page of a captioner's predictions; as `Gallery.finish`."""
    facts = [search_in_words(captioner.search_config)]
    if (doubt := captioner.doubt()) is not None:
        facts.append(f"the captions mean little ({doubt})")
    return gallery.finish(f"Captions by {model_name(model)}", facts)
