"""Starts training from a trained model: its weights, its words and those of the new captions."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from cache.record import CacheError
from cache.store import FeatureCache
from train.captions.vocabulary import SPECIALS, Vocabulary
from train.config import FixedRecipe
from train.model.bundle import Bundle, BundleError, find_bundle, load_bundle
from train.model.decoder import CaptionDecoder, DecoderConfig

# A photo that is added to tied word vectors begins fainter than the usual 1 if captions are fewer
# than this. CIDEr on 1,000 other photos, faint and usual: 50 photos of five captions 13.0 and 10.4,
# 100 photos 17.1 and 17.0, the latter in three times the steps, 250 photos (two seeds) 23.4 and
# 24.9, 6,000 photos 46.2 after 20 epochs and 45.7 after 6.
_FEW_CAPTIONS, _FAINT_PHOTO = 700, 0.2
# The parameters with a row for each word.
_WORD_ROWS = ("embed.weight", "head.weight", "head.bias")


@dataclass(frozen=True)
class StartModel:
    """The model that a run starts from."""

    bundle: Bundle
    sha256: str  # of its file

    def vocabulary(self, new: Vocabulary) -> Vocabulary:
        """The model's words in their order, then the new captions' other words."""
        known = self.bundle.vocabulary
        counts = dict(zip(known.words, known.counts, strict=True))
        for word, count in zip(new.words, new.counts, strict=True):
            counts[word] = counts.get(word, 0) + count
        return dataclasses.replace(
            new,
            words=tuple(counts),
            counts=tuple(counts.values()),
            cases={**known.cases, **new.cases},
            longest=max(known.longest, new.longest),
        )

    def decoder(self, recipe: FixedRecipe, vocabulary: Vocabulary) -> CaptionDecoder:
        """A decoder with the model's sizes and weights and the recipe's dropout.

        vocabulary: as `vocabulary` gives it. Its new words have fresh vectors, and the mean bias of
        the known words, so that they are neither favoured nor shut out.
        """
        trained = self.bundle.decoder
        config = dataclasses.replace(
            trained.config,
            vocab_size=len(vocabulary),
            dropout=recipe.dropout,
            feature_dropout=recipe.feature_dropout,
        )
        decoder = CaptionDecoder(config)
        values, known = decoder.state_dict(), len(self.bundle.vocabulary)
        with torch.no_grad():
            for name, value in trained.state_dict().items():
                if name in _WORD_ROWS:
                    values[name][:known] = value
                else:
                    values[name].copy_(value)
            values["head.bias"][known:] = values["head.bias"][len(SPECIALS) : known].mean()
        return decoder


def load_start_model(path: Path, cache: FeatureCache) -> StartModel:
    """The model in a file or a run folder.

    Raises BundleError if there is none or if training does not compute its kind of decoder, and
    CacheError if it was trained on features of another encoder or captions of another tokenizer
    than the cache holds.
    """
    file = find_bundle(path)
    bundle = load_bundle(file)
    if bundle.decoder.config.start_after_photo:
        raise BundleError(
            f"{file}: an imported model, which reads <start> after the photo; training cannot go "
            "on from it, so leave out --from-model"
        )
    difference = bundle.encoder.difference(cache.encoder)
    if difference is not None:
        raise CacheError(f"{file}: trained on features with {difference} as in {cache.path}")
    tokenizer = bundle.vocabulary.tokenizer
    if tokenizer != cache.captions.tokenizer:
        raise CacheError(
            f"{file}: trained on tokens of --tokenizer {tokenizer}, {cache.path} holds those of "
            f"{cache.captions.tokenizer}; extract with --tokenizer {tokenizer}"
        )
    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{file}: cannot read ({error.strerror})") from None
    return StartModel(bundle, digest)


def new_decoder(
    recipe: FixedRecipe,
    cache: FeatureCache,
    vocabulary: Vocabulary,
    start: StartModel | None,
    captions: int,
) -> CaptionDecoder:
    """The decoder that a run begins with. Random weights are drawn from PyTorch's generator.

    captions: number of training captions.
    """
    if start is not None:
        return start.decoder(recipe, vocabulary)
    decoder = CaptionDecoder(
        DecoderConfig.of_recipe(
            recipe, feature_dim=cache.encoder.feature_dim, vocab_size=len(vocabulary)
        )
    )
    if recipe.tie_embeddings and recipe.photo_every_step and captions < _FEW_CAPTIONS:
        torch.nn.init.constant_(decoder.normalize.weight, _FAINT_PHOTO)
    return decoder
