"""The checks of training that `gpu_check.py` runs."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_check_steps import Figures, Run

from cache.record import EncoderRecord, Skeleton, Strings
from cache.store import open_cache
from cache.writer import open_writer
from train.captions.caption_set import Batch, CaptionSet, caption_set
from train.captions.numbering import build_caption_table
from train.captions.vocabulary import END, PAD, Vocabulary, build_vocabulary
from train.config import BEST, CLASSIC, Recipe, TrainConfig
from train.fit.run import train
from train.fit.trainer import Trainer
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.model.flat_parameters import FlatParameters
from train.step.cpu.objective import CpuObjective
from train.step.cuda.compiled_kernels import compile_kernels
from train.step.cuda.kernel_check import check_kernels
from train.step.cuda.kernel_choice import kernels_for
from train.step.cuda.objective import CudaObjective
from train.step.dropout import Masks, draw_masks
from train.step.packed_batch import pack
from train.step.processes.group import Processes
from train.step.torch_kernels import TorchKernels

CPU = torch.device("cpu")

# Bounds of the relative difference between gradients, which are compared per parameter as vectors,
# and between losses.
GRADIENT_BOUND = {torch.float32: 2e-4, torch.bfloat16: 0.04}
LOSS_BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-3}
# Bounds of the difference between mean losses of ten steps, which are about one nat.
CURVE_BOUND = {"float32": 0.03, "auto": 0.15}
_FEATURES = 64
_WORDS, _BATCH_FEATURES = 997, 72


@dataclass(frozen=True)
class Sizes:
    """How much the checks compute."""

    photos: int
    curve_steps: int  # a multiple of ten
    curve_batch_size: int
    reports_before_break: int  # fewer than a run of three epochs has
    all_options: bool  # of a step; otherwise two combinations


FULL = Sizes(
    photos=1536, curve_steps=300, curve_batch_size=128, reports_before_break=40, all_options=True
)
# To try the checks on a CPU.
SMALL = Sizes(
    photos=256, curve_steps=120, curve_batch_size=32, reports_before_break=10, all_options=False
)


@dataclass(frozen=True)
class TrainingSetting:
    """What the checks work on."""

    device: torch.device
    work: Path  # for files
    sizes: Sizes


def kernels_compile_and_pass_their_check(setting: TrainingSetting) -> Figures:
    """Compares our kernels, and PyTorch's with its fused LSTM cell, with plain operations, in both
    precisions.
    """
    device = setting.device
    figures: Figures = {}
    for dtype in _dtypes(device):
        name = str(dtype).removeprefix("torch.")
        check_kernels(TorchKernels(device, dtype), device, dtype)
        if device.type == "cuda":
            started = time.perf_counter()
            kernels = compile_kernels(device, dtype)
            figures[f"{name}_compile_s"] = round(time.perf_counter() - started, 3)
            check_kernels(kernels, device, dtype)
            assert kernels_for(device, dtype).name == "compiled"
    return figures


def steps_compute_the_plain_loss_and_gradients(setting: TrainingSetting) -> Figures:
    """Compares every option on ragged batches with autograd on the CPU; then, with given dropout
    masks, weights, drawn captions and fixed statistics, with the CPU's objective.
    """
    device = setting.device
    worst: Figures = {}
    for dtype, batch, options in itertools.product(
        _dtypes(device), _batches(), _options(setting.sizes.all_options)
    ):
        name = str(dtype).removeprefix("torch.")
        smoothing = 0.1 if options["tie_embeddings"] else 0.0
        torch.manual_seed(1)
        sizes: dict[str, Any] = {"embedding_size": 48, "hidden_size": 80, **options}
        plain = CaptionDecoder(DecoderConfig(_BATCH_FEATURES, _WORDS, **sizes)).train()
        model = copy.deepcopy(plain).to(device)
        twin = copy.deepcopy(plain)
        objective = CudaObjective(
            model,
            FlatParameters(model, transposed=False),
            dtype=dtype,
            label_smoothing=smoothing,
        )
        packed = pack(_moved(batch, device), round_up=False)

        plain.normalize.train(len(batch.targets) > 1)
        expected = plain.loss(batch, smoothing)
        expected.backward()
        loss = objective.loss_and_gradients(packed) / packed.count()
        objective.parameters.gradients.div_(packed.count())
        _compare(worst, f"{name}: plain", dtype, loss, expected, model, plain)

        reference = CpuObjective(
            twin,
            FlatParameters(twin, transposed=True),
            dtype=torch.float32,
            label_smoothing=smoothing,
        )
        twin.load_state_dict({n: v.cpu() for n, v in model.state_dict().items()})
        packed_on_cpu = pack(batch, round_up=False)
        config = replace(twin.config, dropout=0.4, feature_dropout=0.3)
        masks = draw_masks(config, packed_on_cpu, torch.float32, 7)
        weights = torch.linspace(-1, 2, len(packed_on_cpu.words))
        for drawn, training in ((False, True), (True, False)):
            if drawn and bool((batch.targets[:, 0] == END).any()):
                continue  # a drawn caption has at least one word
            flags = {"drawn": drawn, "training": training}
            expected = reference.loss_and_gradients(packed_on_cpu, masks, weights=weights, **flags)
            loss = objective.loss_and_gradients(
                packed, _masks_on(masks, device, dtype), weights=weights.to(device), **flags
            )
            twin.normalize.train(training)
            _compare(worst, f"{name}: given dropout", dtype, loss, expected, model, twin)
        difference = _difference(objective.loss(packed), reference.loss(packed_on_cpu))
        worst[f"{name}: validation"] = max(worst.get(f"{name}: validation", 0.0), difference)
        assert difference < LOSS_BOUND[dtype], (name, options, difference)
    return worst


def graphs_train_as_direct_steps_do(setting: TrainingSetting) -> Figures:
    """Compares the losses of trainers with and without graphs. Graphs must also draw new dropout
    masks at every replay.
    """
    captions, vocabulary = _caption_set(setting)
    recipe = replace(
        BEST,
        embedding_size=64,
        hidden_size=96,
        batch_size=64,
        epochs=4,
        learning_rate=1e-3,
        dropout=0.0,
        feature_dropout=0.0,
    )
    losses: list[list[float]] = []
    captured = 0
    for graphed in (True, False):
        trainer = _trainer(captions, vocabulary, recipe, precision="float32")
        if not graphed and trainer.graphs is not None:
            trainer.graphs.failure = "to compare"
        losses.append([float(step.loss) for epoch in range(4) for step in trainer.epoch(epoch)])
        if graphed and trainer.graphs is not None:
            assert trainer.graphs.failure == "", trainer.graphs.failure
            captured = len(trainer.graphs._captured)
            assert captured > 0
    graphed_losses, direct_losses = np.array(losses)
    difference = float(np.abs(graphed_losses - direct_losses).max())
    assert difference < 0.02, difference
    figures: Figures = {
        "steps": len(graphed_losses),
        "graphs": captured,
        "largest_difference": difference,
    }
    return figures | (_dropout_of_replays(captions, vocabulary) if captured else {})


def _dropout_of_replays(captions: CaptionSet, vocabulary: Vocabulary) -> Figures:
    """At a learning rate of zero, the loss of a batch depends on the seed of its dropout alone."""
    recipe = replace(CLASSIC, embedding_size=64, hidden_size=96, batch_size=32, dropout=0.5)
    trainer = _trainer(captions, vocabulary, recipe, precision="float32")
    graphs, chosen = trainer.graphs, np.arange(32)
    assert graphs is not None
    losses = [
        float(trainer._graphed_step(graphs, chosen, None, rate=0.0, position=0, seed=seed))
        for seed in (1, 2, 1, 2, 3, 1, 2, 3)
    ]
    direct, replayed = np.array(losses[:2]), np.array(losses[2:]).reshape(2, 3)
    assert len(graphs._captured) == 1
    assert np.abs(replayed[0] - replayed[1]).max() < 1e-5, losses
    spread = float(np.abs(np.diff(replayed[0])).min())
    assert spread > 1e-4, losses
    return {
        "spread_of_dropout": spread,
        "direct_to_replayed": float(np.abs(direct - replayed[0, :2]).max()),
    }


def curves_lie_on_one_another(setting: TrainingSetting) -> Figures:
    """Trains from one seed by the plain path, by the fast one in float32, and by the fast one in
    the precision that `auto` takes.
    """
    captions, vocabulary = _caption_set(setting)
    batch_size = setting.sizes.curve_batch_size
    recipe = replace(CLASSIC, embedding_size=64, hidden_size=128, batch_size=batch_size, epochs=25)
    found = {}
    for name, plain, precision in (
        ("plain", True, "float32"),
        ("float32", False, "float32"),
        ("auto", False, "auto"),
    ):
        trainer = _trainer(captions, vocabulary, recipe, precision=precision, plain=plain)
        steps = (
            step.loss for epoch in range(trainer.recipe.epochs) for step in trainer.epoch(epoch)
        )
        first_steps = itertools.islice(steps, setting.sizes.curve_steps)
        losses = torch.stack([loss.clone() for loss in first_steps]).cpu()
        assert len(losses) == setting.sizes.curve_steps
        found[name] = losses.view(-1, 10).mean(1)
    assert float(found["plain"][-1]) < 0.7 * float(found["plain"][0]), found["plain"]
    figures: Figures = {name: float(losses[-1]) for name, losses in found.items()}
    for name, bound in CURVE_BOUND.items():
        difference = float((found[name] - found["plain"]).abs().max())
        figures[f"{name}_distance"] = difference
        assert difference < bound, figures
    return figures


def resumed_training_reaches_what_an_unbroken_run_does(setting: TrainingSetting) -> Figures:
    """Compares the weights after an interrupted and an unbroken run. The saved state is exact, but
    a GPU adds in any order, so its steps differ by rounding.
    """
    _caption_set(setting)
    work = setting.work
    recipe = replace(
        BEST,
        embedding_size=64,
        hidden_size=96,
        batch_size=64,
        epochs=3,
        learning_rate=1e-3,
        min_count=1,
    )

    def config(name: str, **changes: Any) -> TrainConfig:
        return TrainConfig(
            from_cache=work / "captions.h5",
            out=work / name,
            recipe=recipe,
            device=str(setting.device),
            **changes,
        )

    for _ in train(config("whole")):
        pass
    reports = train(config("broken"))
    for _ in itertools.islice(reports, setting.sizes.reports_before_break):
        pass
    reports.close()
    for _ in train(config("broken", resume=True)):
        pass
    states = [
        torch.load(work / name / "checkpoint.pt", weights_only=True)["trainer"]
        for name in ("whole", "broken")
    ]
    assert states[0]["optimizer"]["steps"] == states[1]["optimizer"]["steps"]
    whole, broken = (
        torch.cat([value.flatten() for value in state["average"].values()]) for state in states
    )
    difference = float((whole - broken).norm() / whole.norm())
    assert difference < 0.02, difference
    return {"difference_of_weights": difference, "same_bits": torch.equal(whole, broken)}


CHECKS: tuple[Callable[[TrainingSetting], Figures], ...] = (
    kernels_compile_and_pass_their_check,
    steps_compute_the_plain_loss_and_gradients,
    graphs_train_as_direct_steps_do,
    curves_lie_on_one_another,
    resumed_training_reaches_what_an_unbroken_run_does,
)


def _step(check: Callable[[TrainingSetting], Figures]) -> Callable[[Run], Figures]:
    def step(run: Run) -> Figures:
        sizes = SMALL if run.small else FULL
        return check(TrainingSetting(torch.device(run.device), run.work, sizes))

    return step


STEPS = {check.__name__: _step(check) for check in CHECKS}


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    native = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    return (torch.float32, torch.bfloat16) if native else (torch.float32,)


def _options(all_of_them: bool) -> Iterator[dict[str, Any]]:
    combinations = list(itertools.product((1, 2), (False, True), (False, True)))
    for layers, tied, every in combinations if all_of_them else (combinations[0], combinations[-1]):
        yield {"num_layers": layers, "tie_embeddings": tied, "photo_every_step": every}


def _batches() -> Iterator[Batch]:
    """Captions of different lengths, one of them empty; a single caption; captions of one word."""
    random = np.random.default_rng(0)
    for lengths in (sorted(random.integers(0, 14, 45).tolist(), reverse=True), [6], [1] * 7):
        targets = torch.full((len(lengths), lengths[0] + 1), PAD)
        for row, length in enumerate(lengths):
            targets[row, :length] = torch.from_numpy(random.integers(4, _WORDS, length))
            targets[row, length] = END
        inputs = targets[:, :-1].masked_fill(targets[:, :-1] == END, PAD)
        features = torch.from_numpy(random.standard_normal((len(lengths), _BATCH_FEATURES)))
        yield Batch(features.half(), inputs, targets)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.features.to(device), batch.inputs.to(device), batch.targets.to(device))


def _masks_on(masks: Masks, device: torch.device, dtype: torch.dtype) -> Masks:
    assert masks.features is not None
    assert masks.inputs is not None
    return Masks(
        masks.features.to(device, dtype),
        masks.inputs.to(device, dtype),
        tuple(mask.to(device, dtype) for mask in masks.layers),
    )


def _compare(
    worst: Figures,
    name: str,
    dtype: torch.dtype,
    loss: torch.Tensor,
    expected: torch.Tensor,
    model: CaptionDecoder,
    reference: CaptionDecoder,
) -> None:
    """Assert that losses and gradients are close, and keep the largest differences in `worst`."""
    difference = _difference(loss, expected.detach())
    assert difference < LOSS_BOUND[dtype], (name, "loss", difference)
    worst[f"{name}, loss"] = max(worst.get(f"{name}, loss", 0.0), difference)
    references = dict(reference.named_parameters())
    for parameter, value in model.named_parameters():
        if parameter == "project.bias" and reference.normalize.training:
            continue  # BatchNorm cancels this bias, so its gradient is only rounding
        gradient = references[parameter].grad
        assert gradient is not None
        assert value.grad is not None
        difference = _difference(value.grad, gradient)
        worst[f"{name}, gradient"] = max(worst.get(f"{name}, gradient", 0.0), difference)
        assert difference < GRADIENT_BOUND[dtype], (name, parameter, model.config, difference)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The length of the difference, relative to the expected length."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-3))


def _caption_set(setting: TrainingSetting) -> tuple[CaptionSet, Vocabulary]:
    """Photos of 48 kinds. Each has three captions, which only differ in length within a kind."""
    photos = setting.sizes.photos
    path = setting.work / "captions.h5"
    if not path.exists():
        random = np.random.default_rng(0)
        kinds = random.integers(48, size=photos)
        texts = [
            [
                " ".join(f"w{(kind * 7 + k * k + kind * k) % 61}" for k in range(length))
                for length in random.integers(3, 12, 3)
            ]
            for kind in kinds
        ]
        names = Strings.pack(f"{n:06d}.jpg" for n in range(photos))
        encoder = EncoderRecord(
            backbone="resnet18",
            weights="check",
            weights_sha256="0" * 64,
            feature_dim=_FEATURES,
            image_size=224,
            views=("full",),
            preprocessing="none",
            precision="float32",
        )
        skeleton = Skeleton(names, names, build_caption_table(texts), encoder, batch_rows=32)
        features = random.standard_normal((48, _FEATURES))[kinds]
        features = features + 0.3 * random.standard_normal(features.shape)
        with open_writer(path, skeleton, library_versions={}) as writer:
            digests = np.zeros((photos, 16), np.uint8)
            writer.write(np.arange(photos), features[:, None].astype(np.float16), digests)
    cache = open_cache(path)
    vocabulary = build_vocabulary(cache.captions, 1)
    captions = caption_set(cache, vocabulary, device=setting.device, max_length=50)
    return captions, vocabulary


def _trainer(
    captions: CaptionSet,
    vocabulary: Vocabulary,
    recipe: Recipe,
    *,
    precision: str,
    plain: bool = False,
    processes: Processes | None = None,
) -> Trainer:
    torch.manual_seed(0)
    config = DecoderConfig.of_recipe(
        recipe, feature_dim=captions.feature_dim, vocab_size=len(vocabulary)
    )
    decoder = CaptionDecoder(config).to(captions.device)
    return Trainer(
        decoder,
        captions,
        recipe,
        seed=0,
        precision=precision,
        plain=plain,
        processes=processes,
    )
