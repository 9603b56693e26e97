"""The model file: decoder weights and sizes, vocabulary, and the identity of the encoder.

A bundle is a safetensors file. It contains no code, so it is safe to load from strangers. Its
metadata holds `cap_bundle`, a JSON object with `version`, `crc32` (the checksum of the whole file,
which files of 0.1.0 do not have), `decoder` (DecoderConfig), `vocabulary`, `encoder`
(EncoderRecord) and `training` (free-form facts about the run).
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cache.atomic import write_atomically
from cache.errors import CapError
from cache.record import EncoderRecord
from train.captions.vocabulary import Vocabulary, VocabularyError
from train.model.decoder import CaptionDecoder, DecoderConfig

VERSION = 2
_OLDER = 1  # without `start_after_photo`; models that do without it are still written so
_KEY = "cap_bundle"
_MEMBERS = {"version", "decoder", "vocabulary", "encoder", "training"}  # besides the checksum
_BEFORE_DIGITS = rb"\"crc32\": \""  # in the header, where the record is a string in JSON
_NO_DIGITS = "00000000"  # in place of the checksum while it is computed
_READ_BYTES = 1 << 24  # at a time


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
        sizes = asdict(self.decoder.config)
        version = VERSION if sizes["start_after_photo"] else _OLDER
        if version == _OLDER:
            del sizes["start_after_photo"]  # which programs that know only that version refuse
        record = {
            "version": version,
            "crc32": _NO_DIGITS,
            "decoder": sizes,
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
            with temporary.open("r+b") as file:
                checksum, place = _checksum(file)
                file.seek(place)
                file.write(checksum.encode())

        write_atomically(path, write)


def load_bundle(path: str | Path, device: torch.device | None = None) -> Bundle:
    """Load a model file, or the best model of a run folder. The decoder is in eval mode.

    Raises BundleError if there is none, if it does not match its checksum, or if its weights are
    not finite. Files of 0.1.0 have no checksum.
    """
    path = find_bundle(Path(path))
    record, tensors = _read(path, weights=True)
    if record.get("version") not in (_OLDER, VERSION):
        raise BundleError(
            f"{path}: model format {record.get('version')}, this program reads {_OLDER} and "
            f"{VERSION}"
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
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise BundleError(
            f"{path}: its weights are not finite (NaN or infinity); "
            "train it again with a lower --learning-rate"
        )
    return Bundle(decoder.to(device or "cpu").eval(), vocabulary, encoder, training)


def read_training(path: Path) -> dict[str, Any]:
    """Read only the `training` facts of a model file, not its weights.

    The checksum is not checked, because that would read the whole file. Raises BundleError.
    """
    training = _read(path, weights=False)[0].get("training")
    if not isinstance(training, dict):
        raise BundleError(f"{path}: damaged model file (no record of the run)")
    return training


def read_record(path: Path) -> dict[str, Any]:
    """The record in a model file's metadata, described at the top. Its weights are not read.

    The checksum is not checked, as in `read_training`. Raises BundleError.
    """
    return _read(path, weights=False)[0]


def _read(path: Path, *, weights: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the record in the metadata, the tensors if they are wanted). Raises BundleError."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            record = json.loads((file.metadata() or {})[_KEY])
            names = file.keys() if weights else []
            tensors = {name: file.get_tensor(name) for name in names}
        if not isinstance(record, dict):
            raise ValueError(f"{_KEY} is not an object")
        intact = not weights or _is_intact(path, record)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise BundleError(f"{path}: not a model file ({error or type(error).__name__})") from None
    if not intact:
        raise BundleError(
            f"{path}: damaged model file (it does not match its checksum); "
            "copy it again or train it again"
        )
    return record, tensors


def _is_intact(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether a model file matches its checksum, or was written without one, as by 0.1.0."""
    if "crc32" not in record:
        # The record of such a file has only these members. A further one is the checksum under a
        # damaged name.
        return set(record) <= _MEMBERS
    with path.open("rb") as file:
        checksum, _ = _checksum(file)
    return bool(record["crc32"] == checksum)


def _checksum(file: BinaryIO) -> tuple[str, int]:
    """(checksum of a model file, position of its eight digits in the file).

    The checksum is the CRC-32 of the whole file with eight zeros as digits. Raises ValueError if
    there is no place for the digits.
    """
    start = file.read(8)
    (length,) = struct.unpack("<Q", start)
    start += file.read(length)
    place = start.index(_BEFORE_DIGITS) + len(_BEFORE_DIGITS)
    crc = zlib.crc32(start[:place] + _NO_DIGITS.encode() + start[place + len(_NO_DIGITS) :])
    while part := file.read(_READ_BYTES):
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}", place


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
