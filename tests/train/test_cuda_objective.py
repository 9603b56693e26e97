"""The GPU's objective computes the values and gradients of autograd. Runs on the CPU, by PyTorch's
operations in place of the kernels, and by the kernels' source where there is a C++ compiler.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import MakeCache
from tests.cuda_on_cpu import CpuDriver, build_for_the_cpu
from tests.train.test_cpu_objective import (
    BATCHES,
    BFLOAT16_BOUND,
    OPTIONS,
    GivenMasks,
    assert_same_gradients,
    decoder,
    ragged,
)
from train.captions.caption_set import caption_set
from train.captions.vocabulary import build_vocabulary
from train.config import BEST, CLASSIC, Recipe
from train.fit.trainer import Trainer
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.model.flat_parameters import FlatParameters
from train.step.cpu.objective import CpuObjective
from train.step.cuda.compiled_kernels import NAMES, SOURCE, CompiledKernels
from train.step.cuda.graphs import GraphedSteps
from train.step.cuda.kernel_check import check_kernels
from train.step.cuda.kernel_choice import begin_kernels, kernels_for
from train.step.cuda.launch import Function, KernelError
from train.step.cuda.objective import CudaObjective
from train.step.dropout import Masks, draw_masks
from train.step.kernels import Kernels
from train.step.packed_batch import PackedBatch, gather_packed, pack
from train.step.torch_kernels import TorchKernels
from train.step.update.optimizer import FlatAdamW
from train.step.update.weight_average import WeightAverage

CPU = torch.device("cpu")
LOW = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def library_for_the_cpu(dtype: torch.dtype, folder: Path) -> Path:
    options = ["-DBFLOAT16"] if dtype is torch.bfloat16 else []
    kernels = {name: name == "cross_entropy" for name in NAMES}  # it has barriers
    return build_for_the_cpu(SOURCE, kernels, folder / f"{str(dtype)[6:]}.so", options)


def built_for_the_cpu(dtype: torch.dtype, folder: Path) -> CompiledKernels:
    driver = CpuDriver(library_for_the_cpu(dtype, folder))
    kernels = CompiledKernels({name: Function(driver, name.encode(), CPU) for name in NAMES})
    kernels.product = TorchKernels(CPU, dtype).product  # type: ignore[method-assign]
    return kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, CompiledKernels]:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to build kernels.cu for the CPU")
    folder = tmp_path_factory.mktemp("kernels")
    return {dtype: built_for_the_cpu(dtype, folder) for dtype in LOW.values()}


@pytest.fixture(params=["torch", "compiled"])
def kernels(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> dict[torch.dtype, Kernels]:
    if request.param == "torch":
        return {dtype: TorchKernels(CPU, dtype) for dtype in LOW.values()}
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    found: dict[torch.dtype, Kernels] = request.getfixturevalue("compiled")
    return found


def objective_of(
    model: CaptionDecoder, kernels: Kernels, dtype: torch.dtype, smoothing: float = 0.0
) -> CudaObjective:
    parameters = FlatParameters(model, transposed=False)
    return CudaObjective(model, parameters, dtype=dtype, label_smoothing=smoothing, kernels=kernels)


@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradients_are_autograds(
    options: dict[str, float], batch_name: str, kernels: dict[torch.dtype, Kernels]
) -> None:
    options = dict(options)
    smoothing, batch = options.pop("label_smoothing"), BATCHES[batch_name]
    plain = decoder(**options)
    model = copy.deepcopy(plain)
    plain.normalize.train(len(batch.targets) > 1)
    expected = plain.loss(batch, smoothing)
    expected.backward()
    objective = objective_of(model, kernels[torch.float32], torch.float32, smoothing)
    objective.parameters.gradients.fill_(float("nan"))  # all must be overwritten
    packed = pack(batch, round_up=False)
    loss = objective.loss_and_gradients(packed) / packed.count()
    objective.parameters.gradients.div_(packed.count())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, plain, 2e-5)
    for name, buffer in plain.named_buffers():  # the running statistics of BatchNorm
        torch.testing.assert_close(model.get_buffer(name), buffer)
    again = objective.loss_and_gradients(pack(BATCHES["ragged"], round_up=False))
    assert torch.isfinite(again)  # the next batch has another size


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bfloat16_stays_within_its_bound(
    options: dict[str, float], kernels: dict[torch.dtype, Kernels]
) -> None:
    options = dict(options)
    smoothing, batch = options.pop("label_smoothing"), BATCHES["more than a rounded step"]
    plain = decoder(**options)
    model = copy.deepcopy(plain)
    expected = plain.loss(batch, smoothing)
    expected.backward()
    objective = objective_of(model, kernels[torch.bfloat16], torch.bfloat16, smoothing)
    packed = pack(batch, round_up=False)
    loss = objective.loss_and_gradients(packed) / packed.count()
    objective.parameters.gradients.div_(packed.count())
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-3)
    assert_same_gradients(model, plain, BFLOAT16_BOUND)


@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_with_the_same_masks_gives_the_same(
    layers: int, kernels: dict[torch.dtype, Kernels]
) -> None:
    batch = BATCHES["ragged"]
    plain = decoder(num_layers=layers, dropout=0.4, feature_dropout=0.3, photo_every_step=True)
    model = copy.deepcopy(plain)
    packed = pack(batch, round_up=False)
    masks = draw_masks(model.config, packed, torch.float32, 7)
    assert masks.features is not None
    assert masks.inputs is not None
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
    objective = objective_of(model, kernels[torch.float32], torch.float32)
    loss = objective.loss_and_gradients(packed, masks) / packed.count()
    objective.parameters.gradients.div_(packed.count())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(model, plain, 2e-5)


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_both_objectives_agree_in_everything_else(
    dtype: torch.dtype, kernels: dict[torch.dtype, Kernels]
) -> None:
    """Masks between layers, weighted rows, drawn captions, running statistics, sampled words."""
    bound = 2e-5 if dtype is torch.float32 else BFLOAT16_BOUND
    twin = decoder(num_layers=2, dropout=0.4, feature_dropout=0.2, tie_embeddings=True)
    model = copy.deepcopy(twin)
    parameters = FlatParameters(twin, transposed=True)
    reference = CpuObjective(twin, parameters, dtype=torch.float32, label_smoothing=0.1)
    objective = objective_of(model, kernels[dtype], dtype, 0.1)
    packed = pack(ragged([9, 7, 7, 4, 3, 1, 1]), round_up=False)
    masks = draw_masks(model.config, packed, torch.float32, 3)
    assert masks.features is not None
    assert masks.inputs is not None
    low = Masks(
        masks.features.to(dtype),
        masks.inputs.to(dtype),
        tuple(mask.to(dtype) for mask in masks.layers),
    )
    weights = torch.linspace(-1, 2, len(packed.words))
    for drawn, training in itertools.product((False, True), repeat=2):
        expected = reference.loss_and_gradients(
            packed, masks, weights=weights, drawn=drawn, training=training
        )
        loss = objective.loss_and_gradients(
            packed, low, weights=weights, drawn=drawn, training=training
        )
        assert float(loss) == pytest.approx(float(expected), rel=bound, abs=100 * bound)
        twin.normalize.train(training)
        assert_same_gradients(model, twin, bound)
    expected, loss = reference.loss(packed), objective.loss(packed)
    assert float(loss) == pytest.approx(float(expected), rel=bound)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_logits_that_are_not_finite_make_the_loss_so(
    dtype: torch.dtype, bad: float, kernels: dict[torch.dtype, Kernels]
) -> None:
    logits = torch.zeros(2, 16, dtype=dtype)
    logits[1, 5] = bad
    losses = torch.zeros(2)
    kernels[dtype].cross_entropy(
        logits, torch.tensor([4, 4]), None, losses, words=12, smoothing=0.1
    )
    assert torch.isfinite(losses).tolist() == [True, False]
    assert torch.isfinite(logits[0]).all()


def graphs_that_repeat_the_step(
    trainer: Trainer, patch: pytest.MonkeyPatch, replayed: list[int]
) -> GraphedSteps:
    """Graphs whose replay calls the step again, without the conversion that a graph lacks."""

    def capture(captions: Tensor, views: Tensor, length: int) -> SimpleNamespace:
        loss = torch.zeros(())

        def replay() -> None:
            replayed.append(length)
            with pytest.MonkeyPatch.context() as without:
                without.setattr(trainer.objective, "refresh", lambda: None)
                loss.copy_(trainer._gather_and_update(captions, views, length))

        return SimpleNamespace(graph=SimpleNamespace(replay=replay), loss=loss)

    assert isinstance(trainer.objective, CudaObjective)
    objective = trainer.objective
    graphs = GraphedSteps(trainer._gather_and_update, lambda: objective.generation)
    patch.setattr(graphs, "_capture", capture)
    return graphs


@pytest.mark.parametrize("precision", LOW)
def test_steps_fed_as_on_a_gpu_train_as_on_a_cpu(
    make_cache: MakeCache,
    monkeypatch: pytest.MonkeyPatch,
    kernels: dict[torch.dtype, Kernels],
    precision: str,
) -> None:
    """With rates, averages, views and token counts from `StepInputs`; a short last batch; rounded
    lengths; and validation with averaged weights between epochs.
    """
    replayed: list[int] = []
    random = np.random.default_rng(0)
    words = [f"w{n}" for n in range(12)]
    texts = [
        [" ".join(random.choice(words, n)) for n in random.integers(1, 26, 2)] for _ in range(21)
    ]
    cache = make_cache(texts, views=("full", "flip"))
    vocabulary = build_vocabulary(cache.captions, 1)
    captions = caption_set(cache, vocabulary, device=CPU, max_length=50)
    recipe = Recipe(
        embedding_size=16, hidden_size=24, batch_size=8, epochs=4, learning_rate=0.01,
        warmup=0.2, decay="cosine", average_decay=0.9, label_smoothing=0.1, weight_decay=0.05,
        photo_every_step=True, tie_embeddings=True,
    )  # fmt: skip
    runs = []
    for as_on_a_gpu in (False, True):
        torch.manual_seed(0)
        model = CaptionDecoder(
            DecoderConfig(8, len(vocabulary), 16, 24, photo_every_step=True, tie_embeddings=True)
        )
        with monkeypatch.context() as patch:
            if as_on_a_gpu:
                patch.setattr(
                    "train.fit.trainer.flat_parameters", partial(FlatParameters, transposed=False)
                )
                given = partial(CudaObjective, kernels=kernels[LOW[precision]])
                patch.setattr("train.fit.trainer.objective_for", given)
                patch.setattr(
                    "train.fit.trainer.pack", lambda batch, round_up: pack(batch, round_up=False)
                )
            trainer = Trainer(model, captions, recipe, seed=0, precision=precision)
            if as_on_a_gpu:
                trainer.graphs = graphs_that_repeat_the_step(trainer, patch, replayed)
            losses = []
            for epoch in range(4):
                losses += [float(step.loss) for step in trainer.epoch(epoch)]
                with trainer.evaluation_weights():
                    losses.append(trainer.validation_loss(captions))
                    low, values = getattr(trainer.objective, "low", None), trainer.parameters.values
                    assert low is None or torch.equal(low, values.to(low.dtype))
        assert trainer.average is not None
        runs.append((losses, trainer.average.state()))
    assert len(replayed) > 10
    if precision == "bfloat16":
        np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=0.01)
        return
    np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=1e-4)
    for name, value in runs[0][1].items():
        if name == "project.bias":
            continue  # BatchNorm cancels this bias, so only rounding moves it
        # Adam makes steps of equal size of small gradients, and so of their rounding. A tenth of a
        # step is no other training.
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_validation_does_not_move_the_buffers_of_training() -> None:
    model = decoder()
    objective = objective_of(model, TorchKernels(CPU, torch.float32), torch.float32)
    objective.loss_and_gradients(pack(BATCHES["ragged"], round_up=False))
    before = objective.generation
    objective.loss(pack(BATCHES["more than a rounded step"], round_up=False))
    assert objective.generation == before
    objective.loss_and_gradients(pack(BATCHES["more than a rounded step"], round_up=False))
    assert objective.generation > before


def test_buffers_that_are_reserved_do_not_move() -> None:
    model = decoder(num_layers=2, tie_embeddings=True)
    objective = objective_of(model, TorchKernels(CPU, torch.float32), torch.float32)
    objective.reserve(37, 12)
    objective.loss_and_gradients(pack(BATCHES["ragged"], round_up=False))
    before = objective.generation
    objective.loss_and_gradients(pack(BATCHES["more than a rounded step"], round_up=False))
    objective.loss_and_gradients(pack(ragged([11] * 37), round_up=False))
    assert objective.generation == before


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_the_kernels_pass_the_check_that_training_makes(
    dtype: torch.dtype, kernels: dict[torch.dtype, Kernels]
) -> None:
    check_kernels(kernels[dtype], CPU, dtype)


@pytest.mark.parametrize("name", [*NAMES, "product"])
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_the_check_names_a_kernel_that_is_wrong_in_one_number(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = TorchKernels(CPU, dtype)
    right = getattr(broken, name)

    def wrong(*arguments: Tensor | None, **options: object) -> None:
        right(*arguments, **options)
        written = arguments[0] if name == "cross_entropy" else arguments[-1]
        assert written is not None
        written.view(-1)[len(written) - 1] += 1

    monkeypatch.setattr(broken, name, wrong)
    kernel = "cell" if name.startswith("cell") else name
    with pytest.raises(KernelError, match=kernel):
        check_kernels(broken, CPU, dtype)


def test_without_a_gpu_the_kernels_are_pytorchs() -> None:
    assert kernels_for(CPU, torch.float32).name == "torch"


def test_kernels_that_do_not_compile_are_reported_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_kernels(device: torch.device, dtype: torch.dtype) -> CompiledKernels:
        raise KernelError("no compiler")

    monkeypatch.setattr("train.step.cuda.kernel_choice.compile_kernels", compile_kernels)
    asked = torch.device("cuda", 99), torch.float32
    begin_kernels(*asked)
    assert kernels_for(*asked).name == "torch"
    assert caplog.messages == [
        "cuda:99: training with PyTorch's operations, slower than compiled kernels (no compiler)"
    ]


class Recorded(TorchDispatchMode):
    """Records the operations that start a kernel: not views, not allocations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not function.is_view and not function.name().startswith("aten::empty"):
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


class NoKernels:
    """Counts the calls of kernels, and computes nothing."""

    name = "none"

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: object) -> None:
            self.calls += 1
            if name == "gather_words":  # others use these as indices
                for written in arguments[-2:]:
                    written.numpy().fill(4)

        return call


@pytest.mark.parametrize(("recipe", "operations"), [(CLASSIC, 82), (BEST, 92)])
def test_a_step_of_thirteen_words_has_at_most_this_many_operations(
    recipe: Recipe, operations: int, make_cache: MakeCache
) -> None:
    """Counts what a graph holds, from the captions' numbers to new weights. BatchNorm and the norm
    count as one operation each, as in PyTorch.
    """
    cache = make_cache([["a b c d e f g h i j k l"]] * 8)
    captions = caption_set(cache, build_vocabulary(cache.captions, 1), device=CPU, max_length=50)
    captions._device_features = torch.from_numpy(np.array(cache.features))
    model = decoder(
        tie_embeddings=recipe.tie_embeddings,
        photo_every_step=recipe.photo_every_step,
        dropout=recipe.dropout,
        feature_dropout=recipe.feature_dropout,
    )
    model.project = nn.Linear(8, 16)
    config = dataclasses.replace(model.config, feature_dim=8)
    kernels = NoKernels()
    objective = objective_of(model, kernels, torch.bfloat16, recipe.label_smoothing)
    optimizer = FlatAdamW(objective.parameters, recipe, kernels=kernels)
    average = WeightAverage(objective.parameters, 0.9) if recipe.average_decay else None
    chosen, views = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    count = torch.ones(())
    for _ in range(2):  # the first step allocates the buffers
        kernels.calls = 0
        with Recorded() as recorded, torch.no_grad():
            packed = gather_packed(captions, kernels, chosen, views, 13)
            masks = draw_masks(config, packed, torch.bfloat16, None)
            loss = objective.loss_and_gradients(packed, masks)
            optimizer.step(count, average, objective.low)
            loss / count
    assert len(recorded.names) + kernels.calls <= operations


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch without CUDA")
@pytest.mark.parametrize("recipe", [CLASSIC, BEST], ids=["classic", "best"])
def test_operations_take_the_shapes_dtypes_and_devices_of_a_step_on_a_gpu(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checked by PyTorch itself, on fake tensors of a GPU, which have no memory."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    device, count, length = torch.device("cuda", 0), 128, 13
    with FakeTensorMode(), torch.no_grad():
        with device:
            model = CaptionDecoder(
                DecoderConfig(
                    2048, 9948, recipe.embedding_size, recipe.hidden_size, 2, recipe.dropout,
                    recipe.feature_dropout, recipe.tie_embeddings, recipe.photo_every_step,
                )
            )  # fmt: skip
        kernels = TorchKernels(device, torch.bfloat16)
        objective = objective_of(model, kernels, torch.bfloat16, recipe.label_smoothing)
        rows = torch.zeros(count * length, dtype=torch.int64, device=device)
        features = torch.zeros(count, 2048, dtype=torch.float16, device=device)
        packed = PackedBatch(features, (count,) * length, rows, rows, rows, rows)
        masks = draw_masks(model.config, packed, torch.bfloat16, None)
        with Recorded() as recorded:
            loss = objective.loss_and_gradients(packed, masks)
        assert (loss.device, loss.dtype, loss.shape) == (device, torch.float32, ())
    seen = recorded.names
    assert seen.count("aten::_thnn_fused_lstm_cell") == 2 * length
    assert seen.count("aten::_thnn_fused_lstm_cell_backward_impl") == 2 * length
    assert seen.count("aten::mm.dtype_out") > 4 * length


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_a_gpu_trains_with_the_compiled_kernels(dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    check_kernels(TorchKernels(device, dtype), device, dtype)
    assert kernels_for(device, dtype).name == "compiled"
