"""Makes a model of a finished run of the tutorial: a run's folder with `best.cap`.

The model computes what the tutorial's does. Its words get other numbers only where ours begin with
other special words. The ResNet's weights are written beside it, because training has changed the
statistics of their BatchNorms even where the rest is torchvision's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cache.atomic import WriteError, draft, remove_leftovers
from cache.record import EncoderRecord
from pipeline.encoder.encoder import encoder_record
from pipeline.encoder.errors import EncoderError
from pipeline.encoder.weights import load_backbone
from pipeline.inspection.classic.checkpoints import (
    DecoderFile,
    EncoderFile,
    read_decoder,
    read_encoder,
)
from pipeline.inspection.classic.errors import ClassicError
from pipeline.inspection.classic.vocabulary_pickle import read_words
from train.captions.vocabulary import SPECIALS, START, Vocabulary
from train.fit.record.run_folder import RunFolder
from train.model.bundle import Bundle
from train.model.decoder import CaptionDecoder, DecoderConfig

MODEL_NAME, WEIGHTS_NAME = "best.cap", "encoder.safetensors"
_IMAGE_SIZE = 224
_WORD_ROWS = ("embed.weight", "head.weight", "head.bias")


@dataclass(frozen=True)
class Imported:
    """A model that was made of a run of the tutorial."""

    model: Path
    weights: Path  # of the ResNet
    decoder: DecoderConfig
    encoder: EncoderRecord
    notices: list[str]  # what the user should know, a line each

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "weights": str(self.weights),
            "backbone": self.encoder.backbone,
            "weights_sha256": self.encoder.weights_sha256,
            "words": self.decoder.vocab_size - len(SPECIALS),
            "embedding_size": self.decoder.embedding_size,
            "hidden_size": self.decoder.hidden_size,
            "num_layers": self.decoder.num_layers,
        }

    def summary(self) -> str:
        facts = self.as_dict()
        layers = "1 layer" if self.decoder.num_layers == 1 else f"{facts['num_layers']} layers"
        return (
            f"{self.model}: {facts['backbone']}, {facts['words']:,} words, "
            f"an LSTM with {layers} of {facts['hidden_size']}"
        )


def import_classic(
    encoder: Path, decoder: Path, vocab: Path, out: Path, *, overwrite: bool = False
) -> Imported:
    """Make a model of two checkpoints of the tutorial and its vocabulary, in the folder `out`.

    overwrite: replace a run's model in `out`. Nothing is written unless the files belong together.
    Raises ClassicError, TrainError (there is a model in `out` already, or a process that trains) or
    WriteError.
    """
    words = read_words(vocab)
    decoder_file = read_decoder(decoder)
    encoder_file = read_encoder(encoder)
    _check_pair(encoder, encoder_file, decoder, decoder_file)
    if len(words) != decoder_file.vocab_size:
        raise ClassicError(
            f"{vocab}: {len(words):,} words, {decoder} has {decoder_file.vocab_size:,}; name the "
            "vocabulary that it was trained with"
        )
    vocabulary = _vocabulary(words)
    order = [words.index(special) for special in SPECIALS]
    order += [number for number, word in enumerate(words) if word not in SPECIALS]
    made = _decoder(encoder_file, decoder_file, torch.tensor(order))
    sources = {"encoder": encoder, "decoder": decoder, "vocab": vocab}
    training = {"imported": {kind: _source(path) for kind, path in sources.items()}}
    notices = [
        notice for notice in (_of_names(encoder, decoder), _of_start(decoder, made)) if notice
    ]
    with _weights_file(out, overwrite) as (temporary, weights), RunFolder(out) as folder:
        if not overwrite:
            folder.start(overwrite=False)  # which refuses before some hundred MB are written
        _save(encoder_file, temporary, weights)
        record = _record(encoder, encoder_file.backbone, temporary, weights)
        if overwrite:
            folder.start(overwrite=True)  # an earlier model goes only when the new one is known
        os.replace(temporary, weights)
        try:
            Bundle(made, vocabulary, record, training).save(out / MODEL_NAME)
        except BaseException:
            weights.unlink(missing_ok=True)
            raise
    return Imported(out / MODEL_NAME, weights, made.config, record, notices)


def _check_pair(
    encoder: Path, encoder_file: EncoderFile, decoder: Path, decoder_file: DecoderFile
) -> None:
    sizes = encoder_file.embedding_size, decoder_file.embedding_size
    if sizes[0] != sizes[1]:
        raise ClassicError(
            f"{decoder}: reads a photo of {sizes[1]} numbers, {encoder} gives {sizes[0]}; name two "
            "checkpoints of one run"
        )


def _vocabulary(words: list[str]) -> Vocabulary:
    """The words without the special ones. How often they occurred is not in the tutorial's file."""
    kept = tuple(word for word in words if word not in SPECIALS)
    return Vocabulary(words=kept, counts=(0,) * len(kept), min_count=0)


def _decoder(
    encoder_file: EncoderFile, decoder_file: DecoderFile, order: torch.Tensor
) -> CaptionDecoder:
    """The decoder in eval mode. order: (W,) the tutorial's number of each of our words."""
    config = DecoderConfig(
        feature_dim=encoder_file.feature_dim,
        vocab_size=decoder_file.vocab_size,
        embedding_size=decoder_file.embedding_size,
        hidden_size=decoder_file.hidden_size,
        num_layers=decoder_file.num_layers,
        start_after_photo=True,
    )
    tensors = encoder_file.projection | decoder_file.tensors
    decoder = CaptionDecoder(config)
    decoder.load_state_dict(
        {name: value[order] if name in _WORD_ROWS else value for name, value in tensors.items()}
    )
    return decoder.eval()


def _source(path: Path) -> str:
    """The name of a file and the beginning of its SHA-256."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{os.fsencode(path.name).decode('utf-8', 'replace')} (SHA-256 {digest[:12]}…)"


def _of_names(encoder: Path, decoder: Path) -> str | None:
    """A notice if the names, `encoder-5-3236` and `decoder-5-3236`, are of different moments."""
    moments = encoder.stem.removeprefix("encoder"), decoder.stem.removeprefix("decoder")
    named = encoder.stem.startswith("encoder-") and decoder.stem.startswith("decoder-")
    if not named or moments[0] == moments[1]:
        return None
    return (
        f"{encoder.name} and {decoder.name}: saved at different moments of training, by their "
        "names; captions are good only if both are of one moment"
    )


@torch.inference_mode()
def _of_start(path: Path, decoder: CaptionDecoder) -> str | None:
    """A notice if the model does not predict `<start>` after the photo, as the tutorial's learn to
    within their first steps.

    The photo is an average one: BatchNorm makes its bias of that.
    """
    photo = decoder.normalize.bias.view(1, 1, -1)
    outputs, _ = decoder.lstm(photo)
    probability = float(decoder.logits(outputs[0, 0]).softmax(0)[START])
    if probability > 0.5:
        return None
    return (
        f"{path}: after an average photo its probability of <start> is {probability:.2g}; it was "
        "hardly trained, or otherwise than the tutorial's models, and its captions may mean little"
    )


@contextlib.contextmanager
def _weights_file(out: Path, overwrite: bool) -> Iterator[tuple[Path, Path]]:
    """(a temporary file in `out`, the file that it is to become). The folder is made; it is removed
    again if it was and stays empty.
    """
    weights = out / WEIGHTS_NAME
    if os.path.lexists(weights) and not overwrite:
        raise ClassicError(
            f"{weights}: there already; replace it with --overwrite, or name another --out"
        )
    try:
        os.path.abspath(out).encode()
    except UnicodeEncodeError:  # safetensors reads no such file
        raise ClassicError(
            f"{out}: no model can be read from a folder whose name is not UTF-8; name another --out"
        ) from None
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{out}: cannot make the folder ({error.strerror})") from None
    try:
        remove_leftovers(weights)
        with draft(weights) as place:
            yield place.with_suffix(weights.suffix), weights
    except OSError as error:
        raise WriteError(f"{weights}: cannot write ({error.strerror or error})") from None
    finally:
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()


def _save(encoder_file: EncoderFile, temporary: Path, weights: Path) -> None:
    tensors = {name: value.clone() for name, value in encoder_file.resnet.items()}
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        save_file(tensors, temporary)
    except SafetensorError as error:  # a full disk, for one
        raise WriteError(f"{weights}: cannot write ({error})") from None
    temporary.chmod(mode)  # safetensors' files have mode 600
    with temporary.open("rb") as file:
        os.fsync(file.fileno())


def _record(encoder: Path, backbone: str, temporary: Path, weights: Path) -> EncoderRecord:
    """The record of the encoder, whose weights will be in `weights`. Raises ClassicError."""
    try:
        loaded = load_backbone(backbone, str(temporary))
    except EncoderError as error:
        reason = str(error).removeprefix(f"{temporary}: ")
        raise ClassicError(f"{encoder}: {reason}") from None
    record = encoder_record(loaded, _IMAGE_SIZE, ("full",), "float32")
    return dataclasses.replace(record, weights=os.path.abspath(weights))
