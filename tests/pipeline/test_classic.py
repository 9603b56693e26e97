"""`cap import-classic`: the model says what the tutorial's own search says."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from torchvision import models

from cache.store import open_cache
from pipeline.captioner import Captioner
from pipeline.encoder.weights import load_backbone
from pipeline.inspection.classic import model
from pipeline.inspection.classic.checkpoints import _as_torchvision, read_encoder
from pipeline.inspection.classic.errors import ClassicError
from pipeline.inspection.classic.model import Imported, import_classic
from pipeline.inspection.contents import facts_of
from tests.pipeline.classic_run import (
    CAPTIONS,
    SPECIALS,
    ClassicRun,
    Encoder,
    Vocabulary,
    pixels_of,
    random_run,
    reordered,
    trained_run,
    write_photos,
)
from tests.pipeline.test_cli import cap
from train.captions.vocabulary import END, START
from train.config import SearchConfig
from train.model import bundle
from train.model.bundle import load_bundle
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.search.hypotheses import search

GREEDY = SearchConfig(beam_size=1, no_repeat_ngram=0)  # as the tutorial searches
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
ORDERS = {  # of the vocabulary
    "as the tutorial's": [*SPECIALS, *WORDS],
    "special words elsewhere": ["<unk>", *WORDS[:9], "<end>", "<start>", *WORDS[9:], "<pad>"],
}


def imported(run: ClassicRun, folder: Path, **written: Any) -> Imported:
    """The model of a run whose files are written into a folder, in its sub-folder `old`."""
    _, encoder, _, decoder, _, vocab = run.write(folder, **written)
    return import_classic(Path(str(encoder)), Path(str(decoder)), Path(str(vocab)), folder / "old")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """The files of an untrained run, as options of the command."""
    return random_run().write(tmp_path_factory.mktemp("untrained"))


@pytest.fixture
def files(untrained: list[object], tmp_path: Path) -> list[object]:
    """Copies of them."""
    return [shutil.copy(each, tmp_path) if isinstance(each, Path) else each for each in untrained]


@pytest.fixture(scope="module")
def trained(paths: list[Path]) -> ClassicRun:
    return trained_run(paths)


@pytest.fixture(scope="module", params=ORDERS)
def run(request: pytest.FixtureRequest, trained: ClassicRun) -> ClassicRun:
    return reordered(trained, ORDERS[request.param])


@pytest.fixture(scope="module")
def old(run: ClassicRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model, which has been moved since. DataParallel saved the run."""
    folder = tmp_path_factory.mktemp("run")
    found = imported(run, folder, prefix="module.")
    assert found.notices == []
    return Path(shutil.move(folder / "old", folder / "moved"))


def test_captions_are_the_tutorials_word_for_word(
    run: ClassicRun, old: Path, paths: list[Path]
) -> None:
    theirs = run.captions(paths)
    assert {" ".join(words[1:-1]) for words in theirs} == set(CAPTIONS)
    assert all((words[0], words[-1]) == ("<start>", "<end>") for words in theirs)
    captioner = Captioner.load(old, device="cpu", search_config=GREEDY)
    ours = captioner.caption(paths)
    assert [list(prediction.words) for prediction in ours] == [words[1:-1] for words in theirs]
    assert captioner.doubt() is None


def test_captions_of_photos_that_it_never_saw_are_the_tutorials_too(
    run: ClassicRun, old: Path, paths: list[Path]
) -> None:
    known = run.encoder.pooled(pixels_of(paths))
    noise = torch.randn(400, 512, generator=torch.manual_seed(0))
    pooled = known.mean(0) + 2 * known.std(0) * noise
    # So small a model does not always begin with `<start>`.
    begins = torch.tensor([words[0] == "<start>" for words in run.captions_of(pooled)])
    pooled = pooled[begins]
    theirs = run.captions_of(pooled)
    said = {" ".join(words) for words in theirs}
    assert said - {f"<start> {caption} <end>" for caption in CAPTIONS}  # new ones are among them
    loaded = load_bundle(old)
    ours = [
        loaded.vocabulary.caption_words(hypothesis.words)
        for hypothesis in search(loaded.decoder, pooled, GREEDY)
    ]
    # The tutorial's twenty words are `<start>` and nineteen, of which the last may be `<end>`.
    assert [list(words[: len(said) - 1]) for words, said in zip(ours, theirs, strict=True)] == [
        [word for word in said[1:] if word != "<end>"] for said in theirs
    ]


def test_logits_are_the_tutorials_to_rounding(run: ClassicRun, old: Path) -> None:
    compare_logits(run, old)


def test_logits_of_several_layers_are_the_tutorials_too(tmp_path: Path) -> None:
    run = random_run(layers=3)
    compare_logits(run, imported(run, tmp_path).model)


def compare_logits(run: ClassicRun, model: Path) -> None:
    """Of a model of random captions, for random features: all at once, and step by step."""
    bundle = load_bundle(model)
    names = [bundle.vocabulary.word(number) for number in range(len(bundle.vocabulary))]
    assert names[:4] == list(SPECIALS)
    order = [run.vocabulary.word2idx[name] for name in names]
    random = torch.manual_seed(0)
    pooled = torch.rand(6, 512, generator=random) * 2
    words = torch.randint(4, len(names), (6, 5), generator=random)
    start = torch.full((6, 1), run.vocabulary.word2idx["<start>"])
    read = torch.tensor(order)[words]
    captions = torch.cat([start, read, start], 1)  # the last word is no input
    with torch.inference_mode():
        theirs = run.decoder(run.encoder.photo(pooled), captions)
        theirs = theirs[:, 1:, order]  # without the prediction of `<start>`
        torch.testing.assert_close(bundle.decoder(pooled, words), theirs, rtol=1e-5, atol=1e-5)
        logits, state = bundle.decoder.step(bundle.decoder.read_photo(pooled), None)
        for step in range(5):
            torch.testing.assert_close(logits, theirs[:, step], rtol=1e-5, atol=1e-5)
            logits, state = bundle.decoder.step(bundle.decoder.embed(words[:, step]), state)
        torch.testing.assert_close(logits, theirs[:, 5], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_log_probabilities_are_the_tutorials_without_start(
    run: ClassicRun, old: Path, paths: list[Path], beam_size: int
) -> None:
    bundle = load_bundle(old)
    pooled = run.encoder.pooled(pixels_of(paths))
    found = search(bundle.decoder, pooled, SearchConfig(beam_size=beam_size, no_repeat_ngram=0))
    for row, hypothesis in enumerate(found):
        words = [START, *hypothesis.words, END]
        theirs = torch.tensor([[run.vocabulary.word2idx[bundle.vocabulary.word(n)] for n in words]])
        with torch.inference_mode():
            logits = run.decoder(run.encoder.photo(pooled[row : row + 1]), theirs)
        expected = logits.log_softmax(2)[0].gather(1, theirs.view(-1, 1))[1:, 0]
        assert list(hypothesis.log_probs) == pytest.approx(expected.tolist(), abs=1e-4)


def test_it_is_scored_from_a_cache_of_its_encoder(
    trained: ClassicRun, paths: list[Path], tmp_path: Path
) -> None:
    old = imported(trained, tmp_path).model.parent
    captions = tmp_path / "captions.csv"
    lines = [f'{path.name},"{text}"' for path, text in zip(paths, CAPTIONS, strict=True)]
    captions.write_text("\n".join(["image,caption", *lines]) + "\n")
    cap(
        "extract-features", "--images", paths[0].parent, "--captions", captions, "--backbone",
        "resnet18", "--weights", old / "encoder.safetensors", "--precision", "float32", "--out",
        tmp_path / "x.h5", "--device", "cpu",
    )  # fmt: skip
    out, _ = cap(
        "evaluate", "--model", old, "--cache", tmp_path / "x.h5", "--no-meteor", "--json",
        "--out", tmp_path / "scores", "--device", "cpu",
    )  # fmt: skip
    assert json.loads(out)["bleu_4"] == pytest.approx(1)  # it knows the captions by heart
    pooled = trained.encoder.pooled(pixels_of(paths))
    cached = torch.from_numpy(open_cache(tmp_path / "x.h5").features[:, 0].astype(np.float32))
    torch.testing.assert_close(cached, pooled, rtol=1e-3, atol=1e-3)

    _, err = cap(
        "train", "--from-cache", tmp_path / "x.h5", "--out", tmp_path / "new", "--from-model", old,
        "--device", "cpu", code=1,
    )  # fmt: skip
    assert err.splitlines()[-1] == (
        f"error: {old}/best.cap: an imported model, which reads <start> after the photo; training "
        "cannot go on from it, so leave out --from-model"
    )
    assert not (tmp_path / "new").exists()


def test_info_says_that_it_was_imported_and_from_which_files(old: Path) -> None:
    facts = facts_of(old)
    assert facts["kind"] == "run"
    assert list(facts["imported"]) == ["encoder", "decoder", "vocab"]
    assert facts["imported"]["encoder"].startswith("encoder-5-36.ckpt (SHA-256 ")
    assert facts["words"] == len(WORDS)
    assert facts["min_count"] is None
    assert "training" not in facts
    out, _ = cap("info", old)
    assert "imported          encoder encoder-5-36.ckpt (SHA-256 " in out
    out, _ = cap("runs", old.parent)
    assert str(old) in out


def test_the_command_says_what_it_made_and_replaces_only_on_request(tmp_path: Path) -> None:
    files = random_run(layers=2).write(tmp_path / "run")
    out, err = cap("import-classic", *files, "--out", tmp_path / "new/old")
    model = tmp_path / "new/old/best.cap"
    assert out == f"{model}: resnet18, {len(WORDS)} words, an LSTM with 2 layers of 24\n"
    notice, advice = err.splitlines()  # the run was not trained
    assert notice.startswith(f"{files[3]}: after an average photo its probability of <start> is 0.")
    weights = tmp_path / "new/old/encoder.safetensors"
    assert f"--backbone resnet18 --weights {weights} --precision float32" in advice
    assert {path.name for path in model.parent.iterdir()} == {"best.cap", "encoder.safetensors"}
    assert weights.stat().st_mode == model.stat().st_mode

    before = model.read_bytes()
    told = ("import-classic", *random_run(hidden=8).write(tmp_path / "other"), "--out")
    _, err = cap(*told, model.parent, code=1)
    assert err == (
        f"error: {weights}: there already; replace it with --overwrite, or name another --out\n"
    )
    weights.rename(tmp_path / "new/elsewhere.safetensors")
    _, err = cap(*told, model.parent, code=1)
    assert "already holds a model; replace it with --overwrite" in err
    assert model.read_bytes() == before
    assert not weights.exists()
    cap(*told, model.parent, "--overwrite")
    assert load_bundle(model).decoder.config.hidden_size == 8
    assert weights.exists()


def test_files_of_different_moments_are_noticed() -> None:
    def notice(encoder: str, decoder: str) -> str | None:
        return model._of_names(Path("a") / encoder, Path("b") / decoder)

    assert notice("encoder-5-36.ckpt", "decoder-5-36.ckpt") is None
    assert notice("encoder.pth", "best.pth") is None  # says nothing of the moment
    found = notice("encoder-5-36.ckpt", "decoder-4-36.ckpt")
    assert found is not None
    assert found.startswith("encoder-5-36.ckpt and decoder-4-36.ckpt: saved at different moments")


@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
        *("wide_resnet50_2", "wide_resnet101_2"),
    ],
)
def test_every_resnet_is_known_by_its_shapes(name: str) -> None:
    with torch.device("meta"):
        network = models.get_model(name, weights=None)
        encoder = Encoder(network, 4)
    state = {key: value for key, value in encoder.state_dict().items() if key[:7] == "resnet."}
    found, renamed = _as_torchvision(Path("x"), state)
    assert found == name
    expected = {key: value.shape for key, value in network.state_dict().items() if key[:3] != "fc."}
    assert {key: value.shape for key, value in renamed.items()} == expected


def test_the_networks_weights_are_those_of_the_file(tmp_path: Path) -> None:
    run = random_run()
    found = imported(run, tmp_path)
    backbone = load_backbone("resnet18", str(found.weights))
    assert backbone.weights_sha256 == found.encoder.weights_sha256
    pixels = torch.randn(2, 3, 64, 64, generator=torch.manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(backbone.network(pixels), run.encoder.pooled(pixels))


def changed(path: Path, **tensors: Tensor | None) -> None:
    """Change tensors of a state dict's file; None removes one. Dots are `__` in the names."""
    state = torch.load(path, weights_only=True)
    for name, value in tensors.items():
        state.pop(name.replace("__", "."), None)
        if value is not None:
            state[name.replace("__", ".")] = value
    torch.save(state, path)


NAN = torch.full((34,), float("nan"))
LAYOUTS: list[tuple[str, dict[str, Tensor | None], str]] = [
    ("decoder", {"attention__weight": torch.ones(1)}, "another layout than the tutorial's (it has "
     "attention.weight)"),
    ("decoder", {"lstm__weight_hh_l0": None, "gru__weight_hh_l0": torch.ones(72, 24)},
     "another layout than the tutorial's (no lstm.weight_hh_l0)"),
    ("decoder", {"linear__bias": torch.ones(5)},
     "another layout than the tutorial's (linear.bias is (5,), must be (34,))"),
    ("decoder", {"linear__bias": NAN}, "linear.bias is not finite (NaN or infinity)"),
    ("decoder", {"embed__weight": torch.ones(34, 8), "lstm__weight_ih_l0": torch.ones(96, 8)},
     "reads a photo of 8 numbers, FOLDER/encoder-5-36.ckpt gives 16; name two checkpoints of one "
     "run"),
    ("decoder", {"embed__weight": torch.ones(0, 16)},
     "another layout than the tutorial's (embed.weight is (0, 16))"),
    ("encoder", {"bn__running_var": None}, "another layout than the tutorial's (no "
     "bn.running_var)"),
    ("encoder", {"resnet__fc__weight": torch.ones(1)},
     "not the tutorial's encoder (resnet.fc.weight is none of a ResNet's numbered parts)"),
    ("encoder", {"resnet__4__0__conv1__weight": torch.ones(32, 64, 1, 1)},
     "not the tutorial's encoder with a ResNet of torchvision (layers of 2, 2, 2, 2 blocks)"),
    ("encoder", {"resnet__7__1__bn2__bias": None},
     "not weights of resnet18 (no layer4.1.bn2.bias)"),
    ("encoder", {"resnet__0__weight": torch.full((64, 3, 7, 7), float("inf"))},
     "conv1.weight is not finite (NaN or infinity), as after a training that diverged; use other "
     "weights"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("which", "tensors", "message"), LAYOUTS, ids=lambda value: str(value)[:40]
)
def test_another_layout_is_one_line_and_nothing_is_written(
    which: str,
    tensors: dict[str, Tensor | None],
    message: str,
    tmp_path: Path,
    files: list[object],
) -> None:
    path = tmp_path / f"{which}-5-36.ckpt"
    changed(path, **tensors)
    before = sorted(tmp_path.rglob("*"))
    _, err = cap("import-classic", *files, "--out", tmp_path / "old", code=1)
    assert err == f"error: {path}: {message.replace('FOLDER', str(tmp_path))}\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_import_leaves_the_earlier_model(tmp_path: Path) -> None:
    found = imported(random_run(), tmp_path)
    before = {path: path.read_bytes() for path in (found.model, found.weights)}
    changed(tmp_path / "encoder-5-36.ckpt", resnet__7__1__bn2__bias=None)
    with pytest.raises(ClassicError, match=r"no layer4\.1\.bn2\.bias"):
        import_classic(
            tmp_path / "encoder-5-36.ckpt",
            tmp_path / "decoder-5-36.ckpt",
            tmp_path / "vocab.pkl",
            tmp_path / "old",
            overwrite=True,
        )
    assert {path: path.read_bytes() for path in (found.model, found.weights)} == before
    assert len(list((tmp_path / "old").iterdir())) == 2


def test_files_that_are_something_else_are_one_line(
    tmp_path: Path, files: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def refused(place: int, path: object) -> str:
        told = [*files[:place], path, *files[place + 1 :]]
        _, err = cap("import-classic", *told, "--out", tmp_path / "old", code=1)
        assert err.count("\n") == 1
        assert not (tmp_path / "old").exists()
        return err

    assert "decoder-5-36.ckpt: is a decoder's checkpoint; name it with --de" in refused(1, files[3])
    assert "encoder-5-36.ckpt: is an encoder's checkpoint; name it with --en" in refused(
        3, files[1]
    )
    assert "vocab.pkl: not a checkpoint of the tutorial (it is of an unknown" in refused(
        1, files[5]
    )
    assert "is a text file, not a file of a network's weights;" in refused(1, __file__)
    assert "is a file of a network's weights, not a pickled vocabulary;" in refused(5, files[1])
    assert "absent.ckpt: cannot read (No such file or directory)" in refused(3, "absent.ckpt")
    assert "absent.pkl: cannot read (No such file or directory)" in refused(5, "absent.pkl")
    torch.save(random_run().decoder, tmp_path / "whole.ckpt")  # not its state dict
    assert "no state dict, or one with more than tensors in it" in refused(3, "whole.ckpt")
    torch.save({"a": 1}, tmp_path / "numbers.ckpt")
    assert "it holds no state dict" in refused(3, "numbers.ckpt")
    half = (tmp_path / "encoder-5-36.ckpt").read_bytes()[:100_000]
    (tmp_path / "half.ckpt").write_bytes(half)
    assert "half.ckpt: not a checkpoint of the tutorial (" in refused(1, "half.ckpt")
    more = pickle.dumps(Vocabulary([*SPECIALS, *WORDS, "more"]))
    (tmp_path / "more.pkl").write_bytes(more)
    assert "more.pkl: 35 words, " in refused(5, "more.pkl")


def test_an_old_file_without_counts_of_batches_is_read(tmp_path: Path) -> None:
    """As PyTorch wrote before 0.4.1, in the format that is no archive."""
    run = random_run()
    run.write(tmp_path)
    path = tmp_path / "encoder-5-36.ckpt"
    state = torch.load(path, weights_only=True)
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, path, _use_new_zipfile_serialization=False)
    assert not path.read_bytes().startswith(b"PK")
    found = read_encoder(path)
    whole = run.encoder.state_dict()
    assert torch.equal(found.projection["normalize.running_var"], whole["bn.running_var"])
    assert found.projection["normalize.num_batches_tracked"] == 0


def test_a_model_that_was_trained_otherwise_gets_a_notice() -> None:
    """After the photo it predicts the first word, not `<start>`."""
    config = DecoderConfig(feature_dim=5, vocab_size=9, embedding_size=4, hidden_size=6)
    decoder = CaptionDecoder(config).eval()
    with torch.no_grad():
        decoder.head.bias[7] = 50.0
    notice = model._of_start(Path("x.ckpt"), decoder)
    assert notice is not None
    assert notice.startswith("x.ckpt: after an average photo its probability of <start> is ")
    with torch.no_grad():
        decoder.head.bias[START] = 100.0
    assert model._of_start(Path("x.ckpt"), decoder) is None


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, files: list[object]) -> None:
    (tmp_path / "file").touch()
    _, err = cap("import-classic", *files, "--out", tmp_path / "file", code=1)
    assert err == f"error: {tmp_path}/file: cannot make the folder (File exists)\n"


def test_names_that_are_not_utf_8_are_read_but_not_written(
    tmp_path: Path, untrained: list[object]
) -> None:
    odd = tmp_path / os.fsdecode(b"\xff")
    odd.mkdir()
    told = [shutil.copy(each, odd) if isinstance(each, Path) else each for each in untrained]
    told[5] = Path(str(told[5])).rename(odd / os.fsdecode(b"\xfe.pkl"))
    _, err = cap("import-classic", *told, "--out", odd / "old", code=1)
    assert "old: no model can be read from a folder whose name is not UTF-8; name another" in err
    assert not (odd / "old").exists()
    cap("import-classic", *told, "--out", tmp_path / "old")
    assert facts_of(tmp_path / "old")["imported"]["vocab"].startswith("\ufffd.pkl (SHA-256 ")


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, files: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(model, "save_file", full)
    before = sorted(tmp_path.rglob("*"))
    _, err = cap("import-classic", *files, "--out", tmp_path / "old", code=1)
    weights = tmp_path / "old" / "encoder.safetensors"
    assert err == f"error: {weights}: cannot write (No space left on device (os error 28))\n"
    monkeypatch.undo()
    monkeypatch.setattr(bundle, "save_file", full)  # for the model, after the weights
    _, err = cap("import-classic", *files, "--out", tmp_path / "old", code=1)
    assert f"{tmp_path}/old/best.cap: cannot write (No space left" in err
    assert sorted(tmp_path.rglob("*")) == before
