"""One file that holds a model: decoder weights, sizes, vocabulary and encoder identity.

A bundle is a safetensors file (no code inside, safe to load from strangers). Its metadata holds
`cap_bundle`, a JSON object: `version`, `decoder` (DecoderConfig), `vocabulary`, `encoder`
(EncoderRecord) and `training` (free-form facts about the run).
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

from cache.atomic import write_atomically
from cache.errors import CapError
from cache.record import EncoderRecord
from train.captions.vocabulary import Vocabulary, VocabularyError
from train.model.decoder import CaptionDecoder, DecoderConfig

VERSION = 1
_KEY = "cap_bundle"


class BundleError(CapError):
    """A model file is missing, damaged or of another version. One line, file first."""


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
        # Parameters may be views of one buffer, and tied ones are listed once: each gets its own.
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in (*self.decoder.named_parameters(), *self.decoder.named_buffers())
        }
        metadata = {_KEY: json.dumps(record, ensure_ascii=False)}

        def write(temporary: Path) -> None:
            try:
                save_file(tensors, temporary, metadata)
            except SafetensorError as error:  # as it calls a full disk
                raise OSError(str(error)) from None

        write_atomically(path, write)


def load_bundle(path: str | Path, device: torch.device | None = None) -> Bundle:
    """Load a model file, or the best one of a run folder; the decoder is in eval mode.

    Raises BundleError.
    """
    path = find_bundle(Path(path))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            record = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BundleError(f"{path}: not a model file ({error or type(error).__name__})") from None
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
    except (RuntimeError, ValueError, TypeError, KeyError, VocabularyError) as error:
        raise BundleError(f"{path}: damaged model file ({str(error).splitlines()[0]})") from None
    return Bundle(decoder.to(device or "cpu").eval(), vocabulary, encoder, record["training"])


def read_training(path: Path) -> dict[str, Any]:
    """The `training` facts of a model file; its weights are not read. Raises BundleError."""
    try:
        with safe_open(path, framework="numpy") as file:
            training = json.loads((file.metadata() or {})[_KEY])["training"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BundleError(f"{path}: not a model file ({error or type(error).__name__})") from None
    if not isinstance(training, dict):
        raise BundleError(f"{path}: damaged model file")
    return training


def find_bundle(path: Path) -> Path:
    """A model file as given, or `best.cap` (else `last.cap`) of a run folder."""
    if path.is_file():
        return path
    for name in ("best.cap", "last.cap"):
        if (path / name).is_file():
            return path / name
    reason = "no best.cap or last.cap in it; has it been trained?" if path.is_dir() else "not found"
    raise BundleError(f"{path}: {reason}")
