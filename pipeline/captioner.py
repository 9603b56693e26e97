"""The stitched model: frozen encoder and trained decoder, from photo files to captions.

from pipeline.captioner import Captioner
for prediction in Captioner.load("runs/base").caption(["dog.jpg", "beach.png"]):
    print(prediction.path, prediction.caption)
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from cache.store import DONE, FeatureCache
from pipeline.datasets import IMAGE_SUFFIXES
from pipeline.encoder import Encoder
from pipeline.photos import ReadPhoto, read_photo
from train.batches import full_view
from train.bundle import Bundle, load_bundle
from train.config import SearchConfig
from train.device import resolve_device
from train.search import Hypothesis, search

_BATCH_PHOTOS = 32


@dataclass(frozen=True)
class Prediction:
    """A caption for one photo, or the reason why there is none."""

    path: str
    caption: str
    score: float  # length-normalized log-probability; 0 is certainty
    error: str = ""

    def as_dict(self) -> dict[str, str | float]:
        if self.error:
            return {"path": self.path, "error": self.error}
        return {"path": self.path, "caption": self.caption, "score": round(self.score, 4)}


class Captioner:
    """Captions photos with a trained model. Make one with `Captioner.load`."""

    def __init__(self, bundle: Bundle, encoder: Encoder, search_config: SearchConfig) -> None:
        self.bundle = bundle
        self.encoder = encoder
        self.search_config = search_config
        views = encoder.record.views
        # Prediction looks at the view that validation looked at.
        self._view = views[views.index("full") if "full" in views else 0]

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str = "auto",
        weights: str | None = None,
        search_config: SearchConfig | None = None,
    ) -> Captioner:
        """Load a model file or a run folder and stitch its backbone onto it.

        weights: where the backbone's weights lie now, if not where the model's record says; they
        must be the same ones. Raises BundleError or EncoderError.
        """
        chosen = resolve_device(device)
        bundle = load_bundle(model, chosen)
        encoder = Encoder.load(bundle.encoder, device=chosen, weights=weights)
        return cls(bundle, encoder, search_config or SearchConfig())

    def caption(self, paths: Iterable[str | Path]) -> list[Prediction]:
        """One prediction a path, in order. A file that is no photo has an `error`, no caption."""
        return list(self.stream(paths))

    def stream(self, paths: Iterable[str | Path]) -> Iterator[Prediction]:
        """As `caption`, batch by batch; the next batch is decoded while one is captioned."""
        names = [str(path) for path in paths]
        size = self.encoder.record.image_size
        if len(names) == 1:
            # A thread of its own would only compete with the encoder's for the cores.
            yield from self._caption_batch(names, [read_photo(Path(names[0]), size, (self._view,))])
            return
        batches = [names[i : i + _BATCH_PHOTOS] for i in range(0, len(names), _BATCH_PHOTOS)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:

            def read(batch: Sequence[str]) -> Iterator[ReadPhoto]:
                return pool.map(lambda name: read_photo(Path(name), size, (self._view,)), batch)

            following = read(batches[0]) if batches else iter(())
            for i, batch in enumerate(batches):
                reads = list(following)
                if i + 1 < len(batches):
                    following = read(batches[i + 1])
                yield from self._caption_batch(batch, reads)

    def _caption_batch(self, names: list[str], reads: list[ReadPhoto]) -> list[Prediction]:
        pixels = [read.pixels for read in reads if read.pixels is not None]
        found = iter(self._search(self.encoder.encode(torch.cat(pixels))) if pixels else ())
        return [
            Prediction(name, "", float("-inf"), read.error)
            if read.pixels is None
            else self._prediction(name, next(found))
            for name, read in zip(names, reads, strict=True)
        ]

    def _search(self, features: torch.Tensor) -> list[Hypothesis]:
        return search(self.bundle.decoder, features, self.search_config)

    def _prediction(self, name: str, hypothesis: Hypothesis) -> Prediction:
        caption = self.bundle.vocabulary.decode(hypothesis.words)
        return Prediction(name, caption, hypothesis.score)


def caption_cache(
    bundle: Bundle, cache: FeatureCache, search_config: SearchConfig
) -> dict[str, Prediction]:
    """Captions for every extracted photo of a cache, by image id. No photo is opened."""
    device = next(bundle.decoder.parameters()).device
    rows = cache.rows_with(DONE)
    features = torch.from_numpy(cache.features[rows, full_view(cache)]).to(device)
    found = search(bundle.decoder, features, search_config)
    return {
        cache.image_ids[row]: Prediction(
            cache.paths[row], bundle.vocabulary.decode(hypothesis.words), hypothesis.score
        )
        for row, hypothesis in zip(rows.tolist(), found, strict=True)
    }


def find_photos(paths: Iterable[str]) -> list[str]:
    """Files as given, folders as the photos below them, globs as what they match; sorted.

    A name that matches nothing stays in the list: captioning it says what is wrong.
    """
    found: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            below = (p for p in Path(path).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            found.extend(sorted(str(p) for p in below if p.is_file()))
        elif os.path.exists(path):
            found.append(path)
        else:
            found.extend(sorted(glob.glob(path, recursive=True)) or [path])
    return list(dict.fromkeys(found))
