"""`cap bench train`: training steps at COCO's size, the classic and the fast one in turns.

The classic step is that of the CNN-LSTM tutorials, fed from the cache: float32, `nn.LSTM` on a
packed sequence, `CrossEntropyLoss`, Adam with its defaults, the classic decoder. The fast step is
what `cap train` runs. With the classic recipe it has the same model and the same objective.

On a CPU, steps are timed one by one. A GPU works through steps while the host prepares the next, as
in training, so a measurement there is a series of steps at whose end the host waits for the device.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from cache.errors import CapError
from cache.store import open_cache
from pipeline.bench.fresh_process import start_cap
from pipeline.bench.machine import peak_rss_mb
from pipeline.bench.synthetic_cache import PHOTOS, write_synthetic_cache
from pipeline.bench.training.train_step import (
    GPU_STEPS,
    ClassicStep,
    milliseconds,
    parts_ms,
    product_rate,
    step_flops,
    without_page_faults,
)
from train.captions.caption_set import CaptionSet, caption_set
from train.captions.epoch_order import epoch_batches
from train.captions.vocabulary import Vocabulary, build_vocabulary
from train.config import CLASSIC, Recipe
from train.device import resolve_device
from train.fit.data_recipe import data_recipe
from train.fit.trainer import Trainer
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.step.cuda.objective import CudaObjective

# On a GPU: classic steps of one measurement, and fast steps before the first measurement.
_GPU_CLASSIC_STEPS, _GPU_WARM_UP = 4, 512


@dataclass(frozen=True)
class TrainBench:
    """Medians of steps that took turns. In milliseconds unless the name says otherwise."""

    device: str
    precision: str
    kernels: str  # between the products: this project's compiled ones, or torch's
    batch_size: int
    embedding_size: int
    hidden_size: int
    num_layers: int
    steps_per_epoch: int
    tokens_per_step: float
    plain_step_ms: float  # the classic step
    # On a CPU with glibc: the classic step in a process that keeps the memory it frees, and the
    # page faults of one as it is. Training keeps none, and neither does the step above.
    plain_kept_ms: float | None
    plain_faults: float | None
    fast_step_ms: float
    parts_ms: dict[str, float]
    limit_step_ms: float  # the products alone, at the fastest rate measured here
    product_tflops: float  # that rate
    measured_epoch_s: float | None  # on a GPU: one whole epoch, the capture of graphs included
    first_step_s: float  # from the prompt to the first step of `cap train`
    beyond_cache_mb: float  # memory of its own that the process needed for the fast steps
    peak_rss_mb: float

    @property
    def ratio(self) -> float:
        return self.plain_step_ms / self.fast_step_ms

    @property
    def limit_share(self) -> float:
        """How much of the step the products alone take: what does not depend on the neighbours."""
        return self.limit_step_ms / self.fast_step_ms

    @property
    def epoch_s(self) -> float:
        return self.fast_step_ms * self.steps_per_epoch / 1e3

    @property
    def limit_epoch_s(self) -> float:
        return self.limit_step_ms * self.steps_per_epoch / 1e3

    @property
    def captions_per_s(self) -> float:
        return 1e3 * self.batch_size / self.fast_step_ms

    def table(self) -> str:
        lines = [
            f"COCO's size on {self.device}: {self.steps_per_epoch:,} steps of {self.batch_size} "
            f"captions, {self.tokens_per_step:,.0f} tokens each; {self.num_layers} x "
            f"{self.hidden_size} hidden, {self.embedding_size} embedded; products in "
            f"{self.precision}, {self.kernels} kernels",
            f"arithmetic limit  {self.limit_step_ms:>9.2f} ms   "
            f"({self.limit_share:.0%} of it reached; {self.product_tflops:.2f} TFLOP/s)",
            f"fast step         {self.fast_step_ms:>9.2f} ms   "
            f"({self.captions_per_s:,.0f} captions/s)",
            *(f"  {name:<16}{value:>9.2f} ms" for name, value in self.parts_ms.items()),
            f"classic step      {self.plain_step_ms:>9.2f} ms   "
            f"(the fast step is {self.ratio:.1f} times as fast)",
            *self._of_page_faults(),
            f"epoch             {self.epoch_s:>9.1f} s    (limit {self.limit_epoch_s:.1f} s"
            + (f"; one took {self.measured_epoch_s:.1f} s)" if self.measured_epoch_s else ")"),
            f"first step        {self.first_step_s:>9.1f} s    after the prompt",
            f"memory            {self.beyond_cache_mb:>9.0f} MB   beyond the cache",
        ]
        return "\n".join(lines)

    def _of_page_faults(self) -> list[str]:
        if self.plain_kept_ms is None:
            return []
        ratio = self.plain_kept_ms / self.fast_step_ms
        return [
            f"  page faults     {self.plain_step_ms - self.plain_kept_ms:>9.2f} ms   "
            f"of that, {self.plain_faults:,.0f} faults; without them {ratio:.1f} times as fast"
        ]


def bench_train(
    recipe: Recipe = CLASSIC,
    *,
    device: str = "auto",
    precision: str = "auto",
    steps: int = 24,
    photos: int = PHOTOS,
    cache: Path | None = None,
) -> TrainBench:
    """Time steps on a cache of COCO's size.

    precision: of the fast step's products, as in `cap train`. steps: how many measurements of each
    kind. photos: fewer photos, with proportionally fewer captions, make the benchmark shorter.
    cache: one that `write_synthetic_cache` made; None to make it in a temporary folder.
    Raises DeviceError, or CapError if a fresh `cap train` fails.
    """
    chosen = resolve_device(device)
    with tempfile.TemporaryDirectory(prefix="cap-bench-") as folder:
        path = Path(folder) / "train.h5"
        if cache is None:
            write_synthetic_cache(path, photos)
        first_step_s = _first_step_s(cache or path, Path(folder) / "run", chosen)
        opened = open_cache(cache or path)
        vocabulary = build_vocabulary(opened.captions, 4)
        captions = caption_set(opened, vocabulary, device=chosen, max_length=50)
        return _time_steps(captions, vocabulary, chosen, recipe, precision, steps, first_step_s)


def _first_step_s(cache: Path, run: Path, device: torch.device) -> float:
    """Seconds from starting `cap train` to its first log line."""
    started = time.perf_counter()
    options = ("--recipe", "classic", "--log-every", 1, "--device", device)
    with start_cap("train", "--from-cache", cache, "--out", run, *options) as process:
        assert process.stderr is not None
        line = "it wrote nothing"
        try:
            for line in process.stderr:
                if "Step [1/" in line:
                    return time.perf_counter() - started
        finally:
            process.kill()
    raise CapError(f"a fresh `cap train` ended before its first step ({line.strip()})")


def _time_steps(
    captions: CaptionSet,
    vocabulary: Vocabulary,
    device: torch.device,
    asked: Recipe,
    precision: str,
    measurements: int,
    first_step_s: float,
) -> TrainBench:
    on_gpu = device.type == "cuda"
    recipe = data_recipe(asked, len(captions))
    batches = epoch_batches(captions.lengths, recipe.batch_size, seed=0, epoch=0)
    trainer = _trainer(captions, vocabulary, device, recipe, precision)
    before_mb = _own_memory_mb()
    epochs = itertools.cycle(range(recipe.epochs))
    steps = itertools.chain.from_iterable(map(trainer.epoch, epochs))
    measured_epoch_s = None
    if on_gpu:
        _take(steps, _GPU_WARM_UP)
        measured_epoch_s = milliseconds(lambda: _take(steps, len(batches)), device) / 1e3
        fast_count, classic_count = GPU_STEPS, _GPU_CLASSIC_STEPS
    else:
        measurements = min(measurements, len(batches) // 2)
        _take(steps, measurements)  # oneDNN compiles kernels for most sizes of batches
        fast_count = classic_count = 1
    beyond_mb = _own_memory_mb() - before_mb
    classic = ClassicStep(DecoderConfig(captions.feature_dim, len(vocabulary)), device)
    classic_batches = (captions.batch(chosen) for chosen in itertools.cycle(batches))
    classic(captions.batch(batches[0]))

    def classic_steps() -> None:
        for batch in itertools.islice(classic_batches, classic_count):
            classic(batch)

    fast_ms, classic_ms = [], []
    for _ in range(measurements):
        fast_ms.append(milliseconds(lambda: _take(steps, fast_count), device) / fast_count)
        classic_ms.append(milliseconds(classic_steps, device) / classic_count)
    kept_ms = faults = None
    if not on_gpu:
        kept_ms, faults = without_page_faults(classic_steps, device, measurements)
    tokens = float(captions.lengths.sum()) / len(batches)
    rate = product_rate(trainer, device, round(tokens))
    objective = trainer.objective
    return TrainBench(
        device=str(device),
        precision=str(objective.dtype).removeprefix("torch."),
        kernels=objective.kernels.name if isinstance(objective, CudaObjective) else "torch",
        batch_size=recipe.batch_size,
        embedding_size=recipe.embedding_size,
        hidden_size=recipe.hidden_size,
        num_layers=recipe.num_layers,
        steps_per_epoch=len(batches),
        tokens_per_step=tokens,
        plain_step_ms=statistics.median(classic_ms),
        plain_kept_ms=kept_ms,
        plain_faults=faults,
        fast_step_ms=statistics.median(fast_ms),
        parts_ms=parts_ms(trainer, batches[measurements], device),
        limit_step_ms=1e3 * step_flops(objective.config, tokens, recipe.batch_size) / rate,
        product_tflops=rate / 1e12,
        measured_epoch_s=measured_epoch_s,
        first_step_s=first_step_s,
        beyond_cache_mb=beyond_mb,
        peak_rss_mb=peak_rss_mb(),
    )


def _trainer(
    captions: CaptionSet,
    vocabulary: Vocabulary,
    device: torch.device,
    recipe: Recipe,
    precision: str,
) -> Trainer:
    torch.manual_seed(0)
    config = DecoderConfig.of_recipe(
        recipe, feature_dim=captions.feature_dim, vocab_size=len(vocabulary)
    )
    decoder = CaptionDecoder(config).to(device)
    return Trainer(decoder, captions, recipe, seed=0, precision=precision)


def _take(steps: Iterator[object], count: int) -> None:
    for _ in itertools.islice(steps, count):
        pass


def _own_memory_mb() -> float:
    """Memory of the process without mapped files, in MB; 0 if the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0
