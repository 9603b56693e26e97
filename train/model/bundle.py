"""The model file: decoder weights and sizes, vocabulary, and the identity of the encoder.

A bundle is a safetensors file. It contains no code, so it is safe to load from strangers. Its
metadata holds `cap_bundle`, a JSON object with `version`, `decoder` (DecoderConfig), `vocabulary`,
`encoder` (EncoderRecord) and `training` (free-form facts about the run).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cache.atomic import write_atomically
from cache.errors import CapError
from cache.record import EncoderRecord
from train.captions.vocabulary import Vocabulary, VocabularyError
from train.model.decoder import CaptionDecoder, DecoderConfig

VERSION = 1
_KEY = "cap_bundle"


class BundleError(CapError):
    """Raised when a model file is missing, damaged or of another version.

    The message is one line that begins with the file.
    """


@dataclass(frozen=True)
class Bundle:
    """A trained decoder and everything needed to use it."""

    decoder: CaptionDecoder
    vocabulary: Vocabulary
    encoder: EncoderRecord
    training: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write atomically. Raises WriteError."""
        record = {
            "version": VERSION,
            "decoder": asdict(self.decoder.config),
            "vocabulary": self.vocabulary.as_dict(),
            "encoder": asdict(self.encoder),
            "training": dict(self.training),
        }
        # Each tensor is copied, because parameters may be views of one buffer, which safetensors
        # refuses. Tied parameters are listed once.
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in (*self.decoder.named_parameters(), *self.decoder.named_buffers())
        }
        metadata = {_KEY: json.dumps(record, ensure_ascii=False)}

        def write(temporary: Path) -> None:
            try:
                save_file(tensors, temporary, metadata)
            except SafetensorError as error:  # a full disk, for one
                raise OSError(str(error)) from None

        write_atomically(path, write)


def load_bundle(path: str | Path, device: torch.device | None = None) -> Bundle:
    """Load a model file, or the best model of a run folder. The decoder is in eval mode.

    Raises BundleError.
    """
    path = find_bundle(Path(path))
    record, tensors = _read(path, weights=True)
    if record.get("version") != VERSION:
        raise BundleError(
            f"{path}: model format {record.get('version')}, this program reads {VERSION}"
        )
    try:
        decoder = CaptionDecoder(DecoderConfig(**record["decoder"]))
        if decoder.config.tie_embeddings:
            tensors["head.weight"] = tensors["embed.weight"]
        decoder.load_state_dict(tensors)
        views = tuple(record["encoder"].pop("views"))
        encoder = EncoderRecord(**record["encoder"], views=views)
        vocabulary = Vocabulary.from_dict(record["vocabulary"])
        if len(vocabulary) != decoder.config.vocab_size:
            raise ValueError(
                f"{len(vocabulary)} words, the decoder has {decoder.config.vocab_size}"
            )
        training = record["training"]
    except (RuntimeError, ValueError, TypeError, KeyError, VocabularyError) as error:
        raise BundleError(f"{path}: damaged model file ({str(error).splitlines()[0]})") from None
    return Bundle(decoder.to(device or "cpu").eval(), vocabulary, encoder, training)


def read_training(path: Path) -> dict[str, Any]:
    """Read only the `training` facts of a model file, not its weights. Raises BundleError."""
    training = _read(path, weights=False)[0].get("training")
    if not isinstance(training, dict):
        raise BundleError(f"{path}: damaged model file (no record of the run)")
    return training


def _read(path: Path, *, weights: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the record in the metadata, the tensors if they are wanted). Raises BundleError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            record = json.loads((file.metadata() or {})[_KEY])
            names = file.keys() if weights else []
            tensors = {name: file.get_tensor(name) for name in names}
        if not isinstance(record, dict):
            raise ValueError(f"{_KEY} is not an object")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BundleError(f"{path}: not a model file ({error or type(error).__name__})") from None
    return record, tensors


def find_bundle(path: Path) -> Path:
    """The path itself if it is a file; in a run folder `best.cap` or, without that, `last.cap`.

    Raises BundleError if there is none.
    """
    if path.is_file():
        return path
    for name in ("best.cap", "last.cap"):
        if (path / name).is_file():
            return path / name
    reason = "no best.cap or last.cap in it; has it been trained?" if path.is_dir() else "not found"
    raise BundleError(f"{path}: {reason}")
