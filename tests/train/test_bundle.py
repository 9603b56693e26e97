from __future__ import annotations

import os
import re
import stat
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import ROOT, record
from train.captions.numbering import build_caption_table
from train.captions.vocabulary import build_vocabulary
from train.model.bundle import Bundle, BundleError, load_bundle, read_record, read_training
from train.model.decoder import CaptionDecoder, DecoderConfig


def made() -> Bundle:
    torch.manual_seed(0)
    vocabulary = build_vocabulary(build_caption_table([["A “dog” says: crc32 ."]]), 1)
    sizes = DecoderConfig(
        feature_dim=8, vocab_size=len(vocabulary), embedding_size=3, hidden_size=4
    )
    return Bundle(CaptionDecoder(sizes).eval(), vocabulary, record(), {"epoch": 3})


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    bundle = made()
    bundle.save(tmp_path / "x.cap")
    loaded = load_bundle(tmp_path / "x.cap")
    assert loaded.vocabulary.as_dict() == bundle.vocabulary.as_dict()
    assert (loaded.encoder, loaded.training) == (bundle.encoder, bundle.training)
    for name, tensor in bundle.decoder.state_dict().items():
        assert torch.equal(loaded.decoder.state_dict()[name], tensor), name
    assert read_training(tmp_path / "x.cap") == {"epoch": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["x.cap"]


def test_only_a_model_that_reads_start_after_the_photo_has_the_new_version(tmp_path: Path) -> None:
    """Programs that know version 1 alone read all others."""
    made().save(tmp_path / "x.cap")
    record = read_record(tmp_path / "x.cap")
    assert record["version"] == 1
    assert "start_after_photo" not in record["decoder"]
    old = made()
    decoder = CaptionDecoder(replace(old.decoder.config, start_after_photo=True))
    decoder.load_state_dict(old.decoder.state_dict())
    replace(old, decoder=decoder).save(tmp_path / "y.cap")
    record = read_record(tmp_path / "y.cap")
    assert record["version"] == 2
    assert record["decoder"]["start_after_photo"] is True
    assert load_bundle(tmp_path / "y.cap").decoder.config == decoder.config


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.cap" for i in range(8)]
    for file in files:
        made().save(file)
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_model_has_the_mode_of_other_files(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        made().save(tmp_path / "x.cap")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.cap").stat().st_mode) == mode


def test_any_flipped_byte_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.cap"
    made().save(path)
    whole = path.read_bytes()
    (length,) = struct.unpack_from("<Q", whole)
    random = np.random.default_rng(0)
    places = [*range(8 + length), *random.integers(8 + length, len(whole), 200).tolist()]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(BundleError) as caught:
            load_bundle(path)
        assert re.fullmatch(rf"{path}: (damaged|not a) model file \(.+", str(caught.value)), place


def test_a_flipped_weight_is_told_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "x.cap"
    made().save(path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(BundleError) as caught:
        load_bundle(path)
    assert str(caught.value) == (
        f"{path}: damaged model file (it does not match its checksum); "
        "copy it again or train it again"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    bundle = made()
    with torch.no_grad():
        bundle.decoder.head.weight[1, 1] = value
    bundle.save(tmp_path / "x.cap")
    with pytest.raises(BundleError, match=r"x\.cap: its weights are not finite .*learning-rate"):
        load_bundle(tmp_path / "x.cap")


def test_a_model_of_0_1_0_has_no_checksum_and_gets_one(tmp_path: Path) -> None:
    old = ROOT / "tests" / "formats" / "v0.1.0" / "run" / "best.cap"
    assert b"crc32" not in old.read_bytes()
    bundle = load_bundle(old)
    replace(bundle, training={}).save(tmp_path / "x.cap")
    assert rb"\"crc32\": \"" in (tmp_path / "x.cap").read_bytes()
    assert load_bundle(tmp_path / "x.cap").encoder == bundle.encoder
