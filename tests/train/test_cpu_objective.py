"""The CPU's objective computes the values and gradients of the plain decoder under autograd."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import MakeCache
from train.captions.caption_set import Batch, caption_set
from train.captions.vocabulary import END, PAD, build_vocabulary
from train.config import Recipe
from train.fit.trainer import Trainer
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.model.flat_parameters import FlatParameters
from train.step.cpu.objective import CpuObjective
from train.step.dropout import Masks, draw_masks
from train.step.packed_batch import PackedBatch, gather_packed, pack
from train.step.torch_kernels import TorchKernels

FEATURES, WORDS = 20, 70
# Bound of the relative difference between each gradient and autograd's in float32.
BFLOAT16_BOUND = 0.04


def ragged(lengths: list[int], seed: int = 0) -> Batch:
    """Captions with these numbers of words, longest first. 0 is an empty caption."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.full((len(lengths), lengths[0] + 1), PAD)
    for row, length in enumerate(lengths):
        targets[row, :length] = torch.randint(4, WORDS, (length,), generator=generator)
        targets[row, length] = END
    inputs = targets[:, :-1].masked_fill(targets[:, :-1] == END, PAD)
    features = torch.randn(len(lengths), FEATURES, generator=generator).half()
    return Batch(features, inputs, targets)


BATCHES = {
    "ragged": ragged([9, 7, 7, 4, 3, 1, 0]),
    "one word each": ragged([1] * 5),
    "one caption": ragged([6]),
    "no words at all": ragged([0, 0]),
    "more than a rounded step": ragged(sorted(np.random.default_rng(1).integers(1, 12, 37))[::-1]),
}


def decoder(**changes: object) -> CaptionDecoder:
    torch.manual_seed(1)
    sizes: dict[str, object] = {"embedding_size": 16, "hidden_size": 24}
    return CaptionDecoder(DecoderConfig(FEATURES, WORDS, **(sizes | changes))).train()  # type: ignore[arg-type]


class GivenMasks(nn.Module):
    """Replaces dropout: applies the given masks of packed rows, one per call, to (B, T, size)."""

    def __init__(self, packed: PackedBatch, masks: list[Tensor], batch: Batch) -> None:
        super().__init__()
        self.remaining = list(masks)
        self.shape = batch.targets.shape
        self.rows: list[tuple[int, int, int]] = []  # caption, step, packed row
        start = 0
        for step, count in enumerate(packed.steps):
            self.rows += [(b, step, start + b) for b in range(min(count, self.shape[0]))]
            start += count

    def forward(self, values: Tensor) -> Tensor:
        mask, padded = self.remaining.pop(0), torch.zeros_like(values)
        for caption, step, row in self.rows:
            padded[caption, step] = mask[row].to(values.dtype)
        return values * padded


def fast(model: CaptionDecoder, dtype: torch.dtype, smoothing: float = 0.0) -> CpuObjective:
    parameters = FlatParameters(model, transposed=True)
    return CpuObjective(model, parameters, dtype=dtype, label_smoothing=smoothing)


def assert_same_gradients(model: CaptionDecoder, plain: CaptionDecoder, bound: float) -> None:
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        gradient, wanted = parameter.grad, expected[name].grad
        assert gradient is not None
        assert wanted is not None
        if name == "project.bias" and plain.normalize.training:
            continue  # BatchNorm cancels this bias, so its gradient is only rounding
        assert (gradient - wanted).norm() <= bound * wanted.norm() + 1e-6, name


OPTIONS = [
    {
        "num_layers": layers,
        "tie_embeddings": tied,
        "photo_every_step": tied if layers == 1 else not tied,
        "label_smoothing": smoothing,
    }
    for layers, tied, smoothing in itertools.product((1, 2), (False, True), (0.0, 0.1))
]


@pytest.mark.parametrize("round_up", [True, False])
@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradients_are_autograds(
    options: dict[str, float], batch_name: str, round_up: bool
) -> None:
    options = dict(options)
    smoothing, batch = options.pop("label_smoothing"), BATCHES[batch_name]
    plain = decoder(**options)
    model = copy.deepcopy(plain)
    plain.normalize.train(len(batch.targets) > 1)
    expected = plain.loss(batch, smoothing)
    expected.backward()
    objective = fast(model, torch.float32, smoothing)
    packed = pack(batch, round_up=round_up)
    loss = objective.loss_and_gradients(packed) / packed.count()
    objective.parameters.gradients.div_(packed.count())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, plain, 2e-5)
    for name, buffer in plain.named_buffers():  # the running statistics of BatchNorm
        torch.testing.assert_close(model.get_buffer(name), buffer)
    again = objective.loss_and_gradients(pack(BATCHES["ragged"], round_up=round_up))
    assert torch.isfinite(again)  # the next batch has another size


@pytest.mark.parametrize("scale", [30.0, 3000.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_hopeless_targets_is_autograds_too(scale: float, smoothing: float) -> None:
    batch, plain = BATCHES["more than a rounded step"], decoder()
    plain.head.weight.data.mul_(scale)
    plain.head.bias.data.normal_(std=scale)
    model = copy.deepcopy(plain)
    expected = plain.loss(batch, smoothing)
    expected.backward()
    assert expected > scale  # with a scale of 3,000 no probability of a target is above 0
    objective = fast(model, torch.float32, smoothing)
    packed = pack(batch, round_up=True)
    loss = objective.loss_and_gradients(packed) / packed.count()
    objective.parameters.gradients.div_(packed.count())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(model, plain, 1e-4)
    with torch.no_grad():
        expected = plain.eval().loss(batch)
    torch.testing.assert_close(objective.loss(packed), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bfloat16_stays_within_its_bound(options: dict[str, float]) -> None:
    options = dict(options)
    smoothing, batch = options.pop("label_smoothing"), BATCHES["more than a rounded step"]
    plain = decoder(**options)
    model = copy.deepcopy(plain)
    expected = plain.loss(batch, smoothing)
    expected.backward()
    objective = fast(model, torch.bfloat16, smoothing)
    packed = pack(batch, round_up=True)
    loss = objective.loss_and_gradients(packed) / packed.count()
    objective.parameters.gradients.div_(packed.count())
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-3)
    assert_same_gradients(model, plain, BFLOAT16_BOUND)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("round_up", [True, False])
def test_dropout_with_the_same_masks_gives_the_same(layers: int, round_up: bool) -> None:
    batch = BATCHES["ragged"]
    plain = decoder(num_layers=layers, dropout=0.4, feature_dropout=0.3)
    model = copy.deepcopy(plain)
    packed = pack(batch, round_up=round_up)
    masks = draw_masks(model.config, packed, torch.float32, 7)
    assert masks.features is not None
    assert masks.inputs is not None
    assert len(masks.layers) == layers
    of_features = masks.features
    plain.feature_dropout.register_forward_hook(
        lambda module, inputs, output: inputs[0] * of_features
    )
    plain.lstm.dropout = 0.0  # its dropout between layers cannot be given a mask
    given = GivenMasks(packed, [masks.inputs, masks.layers[-1]], batch)
    if layers == 2:
        ones = torch.ones_like(masks.layers[0])
        masks = Masks(masks.features, masks.inputs, (ones, masks.layers[1]))
    plain.dropout = given  # type: ignore[assignment]
    expected = plain.loss(batch)
    expected.backward()
    objective = fast(model, torch.float32)
    loss = objective.loss_and_gradients(packed, masks) / packed.count()
    objective.parameters.gradients.div_(packed.count())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, plain, 2e-5)


def test_losses_of_rows_are_multiplied_by_their_weights() -> None:
    """Compared with autograd over the plain logits."""
    batch = BATCHES["ragged"]
    plain = decoder()
    model = copy.deepcopy(plain)
    weights = torch.linspace(-1, 2, len(batch.targets))
    log_probs = plain(batch.features, batch.inputs).log_softmax(-1)
    picked = log_probs.gather(2, batch.targets.unsqueeze(-1)).squeeze(-1)
    expected = -(picked * (batch.targets != PAD) * weights.unsqueeze(1)).sum()
    expected.backward()
    objective, packed = fast(model, torch.float32), pack(batch, round_up=True)
    of_rows = torch.nn.functional.pad(weights, (0, 64))[packed.captions]
    loss = objective.loss_and_gradients(packed, weights=of_rows)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(model, plain, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_validation_loss_is_the_plain_one_without_dropout(dtype: torch.dtype) -> None:
    model = decoder(dropout=0.5, tie_embeddings=True)
    plain = copy.deepcopy(model).eval()
    objective = fast(model, dtype, smoothing=0.1)
    with torch.no_grad():
        expected = plain.loss(BATCHES["ragged"])
    before = model.normalize.running_mean.clone()  # type: ignore[union-attr]
    loss = objective.loss(pack(BATCHES["ragged"], round_up=True))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5 if dtype.itemsize == 4 else 1e-3)
    assert torch.equal(model.normalize.running_mean, before)  # type: ignore[arg-type]


def test_dropout_masks_keep_the_right_share() -> None:
    config = DecoderConfig(FEATURES, WORDS, 64, 128, 2, dropout=0.3, feature_dropout=0.6)
    packed = pack(ragged([9] * 500), round_up=False)
    for seed in (3, None):
        masks = draw_masks(config, packed, torch.float32, seed)
        assert masks.features is not None
        assert masks.inputs is not None
        shapes = [mask.shape for mask in (masks.features, masks.inputs, *masks.layers)]
        assert shapes == [(500, FEATURES), (5000, 64), (5000, 128), (5000, 128)]
        assert masks.features.unique().tolist() == pytest.approx([0, 1 / 0.4], rel=1e-4)
        assert float(masks.features.mean()) == pytest.approx(1, abs=0.05)
        for mask in (masks.inputs, *masks.layers):
            assert mask.unique().tolist() == pytest.approx([0, 1 / 0.7], rel=1e-4)
            assert float(mask.mean()) == pytest.approx(1, abs=0.02)
        assert not torch.equal(masks.layers[0], masks.layers[1])
    again = [draw_masks(config, packed, torch.float32, 3) for _ in range(2)]
    assert torch.equal(again[0].layers[1], again[1].layers[1])
    assert draw_masks(DecoderConfig(5, 9), packed, torch.float32, 3) == Masks(None, None, ())


def curves(make_cache: MakeCache, **changes: object) -> dict[str, list[float]]:
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    captions = [
        [" ".join(words[(n * 7 + k * k) % 40] for k in range(random.integers(3, 9)))] * 2
        for n in range(60)
    ]
    cache = make_cache(captions)
    vocabulary = build_vocabulary(cache.captions, 1)
    device = torch.device("cpu")
    torch.set_num_threads(1)  # a second one slows these small products down
    recipe = Recipe(embedding_size=16, hidden_size=32, batch_size=16, learning_rate=0.01, epochs=40)
    found = {}
    for name, plain, precision in (
        ("plain", True, "float32"),
        ("fast", False, "float32"),
        ("low", False, "bfloat16"),
    ):
        torch.manual_seed(0)
        model = CaptionDecoder(DecoderConfig(8, len(vocabulary), 16, 32, **changes))  # type: ignore[arg-type]
        captions_of = caption_set(cache, vocabulary, device=device, max_length=50)
        trainer = Trainer(model, captions_of, recipe, seed=0, plain=plain, precision=precision)
        found[name] = [float(step.loss) for epoch in range(40) for step in trainer.epoch(epoch)]
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_loss_curves_lie_on_one_another(make_cache: MakeCache, tied: bool) -> None:
    """For 320 steps from one seed: in float32 to rounding, in bfloat16 within noise."""
    found = {
        name: np.array(losses) for name, losses in curves(make_cache, tie_embeddings=tied).items()
    }
    assert len(found["plain"]) == 320
    assert found["plain"][-8:].mean() < 0.5 * found["plain"][:8].mean()
    assert np.abs(found["fast"] - found["plain"])[:100].max() < 1e-3
    smooth = {name: losses.reshape(-1, 8).mean(1) for name, losses in found.items()}
    assert np.abs(smooth["fast"] - smooth["plain"]).max() < 0.02
    assert np.abs(smooth["low"] - smooth["plain"]).max() < 0.1


def test_parameters_move_into_one_buffer_and_keep_their_values() -> None:
    for tied, transposed in itertools.product((False, True), repeat=2):
        model = decoder(tie_embeddings=tied)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        parameters = FlatParameters(model, transposed=transposed)
        assert parameters.padded_words == 80
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        with torch.no_grad():
            parameters.values.mul_(2)
        assert torch.equal(
            model.get_parameter("lstm.weight_hh_l0"), 2 * before["lstm.weight_hh_l0"]
        )
        if tied:
            assert model.head.weight is model.embed.weight
        saved = parameters.named(parameters.values)
        assert all(value.is_contiguous() for value in saved.values())
        other = torch.zeros_like(parameters.values)
        parameters.load(saved, other)
        for name in parameters.names():
            assert torch.equal(parameters.view(name, other), model.get_parameter(name))


def test_validation_may_come_before_training_and_be_longer(make_cache: MakeCache) -> None:
    cache = make_cache([["a dog"], ["a cat"], ["a dog and a cat and a bird on a hill"]] * 2)
    vocabulary = build_vocabulary(cache.captions, 1)
    sets = [
        caption_set(
            cache, vocabulary, rows=np.array(rows), device=torch.device("cpu"), max_length=50
        )
        for rows in ([0, 1, 3, 4], [2, 5])
    ]
    model = CaptionDecoder(DecoderConfig(8, len(vocabulary), 16, 32))
    trainer = Trainer(model, sets[0], Recipe(batch_size=2, epochs=2), seed=0)
    for epoch in range(2):
        before = trainer.validation_loss(sets[1])
        for _ in trainer.epoch(epoch):
            pass
        assert trainer.validation_loss(sets[0]) != before


@pytest.mark.parametrize("length", [5, 8])
def test_rows_gathered_on_the_device_are_the_packed_batch(
    make_cache: MakeCache, length: int
) -> None:
    """length: that of the longest caption, or of a graph for longer ones."""
    texts = [["a dog runs", "dog"], [], ["a a a cat", "a dog"]]
    cache = make_cache(texts, views=("full", "flip"))
    vocabulary = build_vocabulary(cache.captions, 1)
    device = torch.device("cpu")
    captions = caption_set(cache, vocabulary, device=device, max_length=50)
    chosen, views = torch.tensor([2, 0, 1, 3]), torch.tensor([0, 1, 1, 0])
    expected = pack(captions.gather(chosen, views, length), round_up=False)
    found = gather_packed(captions, TorchKernels(device, torch.float32), chosen, views, length)
    assert found.steps == expected.steps
    for name in ("features", "targets", "captions", "previous"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert torch.equal(found.words[4:], expected.words[4:])  # the rows of step 0 read the photo


def test_the_plain_path_never_rounds_float32_to_tf32(
    make_cache: MakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's LSTM does so by default. The caller's setting stays."""
    cache = make_cache([["a b c", "b a"]] * 4)
    vocabulary = build_vocabulary(cache.captions, 1)
    captions = caption_set(cache, vocabulary, device=torch.device("cpu"), max_length=50)
    model = CaptionDecoder(DecoderConfig(8, len(vocabulary), 4, 4))
    trainer = Trainer(model, captions, Recipe(batch_size=4), seed=0, plain=True)
    allowed: list[bool] = []
    loss = model.loss

    def watched(batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return loss(batch, label_smoothing)

    monkeypatch.setattr(model, "loss", watched)
    before = torch.backends.cudnn.allow_tf32
    steps = len(list(trainer.epoch(0)))
    trainer.validation_loss(captions)
    assert allowed == [False] * (steps + 2)
    assert torch.backends.cudnn.allow_tf32 == before
