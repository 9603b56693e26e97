"""`cap bench train`: a training step at COCO's size, the tutorials' way and ours, in turns.

The classic step is the one of the CNN-LSTM tutorials, fed from the cache: float32, `nn.LSTM` on a
packed sequence, `CrossEntropyLoss`, Adam as it comes, with the classic decoder. The fast one is
what `cap train` runs: with the classic recipe the same model and the same objective.

A CPU's steps are timed one by one. A GPU works through steps while the host prepares the next, as
it does in training; so there a measurement is a row of steps, and waits for the device once.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from cache.record import CaptionTable, EncoderRecord, Skeleton, Strings
from cache.store import DIGEST_BYTES, open_cache
from cache.writer import open_writer
from train.captions.caption_set import Batch, CaptionSet, caption_set, epoch_batches
from train.captions.vocabulary import PAD, Vocabulary, build_vocabulary
from train.config import CLASSIC, Recipe
from train.device import resolve_device
from train.fit.trainer import Trainer
from train.machine import peak_rss_mb
from train.model.decoder import CaptionDecoder, DecoderConfig
from train.step.cpu.matmul import multiply
from train.step.cuda.objective import CudaObjective
from train.step.dropout import draw_masks
from train.step.packed_batch import gather_packed, pack

# COCO train2014.
PHOTOS, CAPTIONS, WORDS, FEATURE_DIM = 82_783, 414_113, 9_944, 2048
_WRITE_ROWS = 4096
_PART_REPEATS = 5
# Of a GPU's measurements, in steps: the fast ones, the classic ones, and those before the first.
_GPU_ROW, _GPU_CLASSIC_ROW, _GPU_WARM_UP = 64, 4, 512


@dataclass(frozen=True)
class TrainBench:
    """Medians of interleaved steps of one run; milliseconds unless the name says otherwise."""

    device: str
    precision: str
    kernels: str  # between the products: compiled ones of ours, or torch's
    batch_size: int
    embedding_size: int
    hidden_size: int
    num_layers: int
    steps_per_epoch: int
    tokens_per_step: float
    plain_step_ms: float  # the classic step
    fast_step_ms: float
    parts_ms: dict[str, float]
    limit_step_ms: float  # the products alone, at the fastest rate seen here
    product_tflops: float  # that rate
    measured_epoch_s: float | None  # a whole epoch by the clock, on a GPU; captures included
    first_step_s: float  # from the prompt to the first step of `cap train`
    beyond_cache_mb: float  # what the fast steps added to the process, in memory of its own
    peak_rss_mb: float

    @property
    def ratio(self) -> float:
        return self.plain_step_ms / self.fast_step_ms

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
            f"classic step      {self.plain_step_ms:>9.2f} ms",
            f"fast step         {self.fast_step_ms:>9.2f} ms   ({self.ratio:.1f} times as fast, "
            f"{self.captions_per_s:,.0f} captions/s)",
            *(f"  {name:<16}{value:>9.2f} ms" for name, value in self.parts_ms.items()),
            f"arithmetic limit  {self.limit_step_ms:>9.2f} ms   "
            f"({self.product_tflops:.2f} TFLOP/s; {self.limit_step_ms / self.fast_step_ms:.0%} "
            "of it reached)",
            f"epoch             {self.epoch_s:>9.1f} s    (limit {self.limit_epoch_s:.1f} s"
            + (f"; one took {self.measured_epoch_s:.1f} s)" if self.measured_epoch_s else ")"),
            f"first step        {self.first_step_s:>9.1f} s    after the prompt",
            f"memory            {self.beyond_cache_mb:>9.0f} MB   beyond the cache",
        ]
        return "\n".join(lines)


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

    precision: of the fast step's products, as `cap train` takes it. steps: measurements of each
    kind. photos: fewer make a smaller, quicker bench with as many captions less. cache: one that
    `write_synthetic_cache` made; None: make it in a temporary folder.
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


def write_synthetic_cache(path: Path, photos: int) -> None:
    """A cache with random features, and five captions a photo with lengths and word frequencies
    like COCO's: 11.5 words in the mean, Zipf's law over 9,944 words that all occur four times.
    """
    random = np.random.default_rng(0)
    captions = round(CAPTIONS * photos / PHOTOS)
    lengths = np.clip(np.round(random.gamma(24, 0.32, captions) + 3.8), 7, 50).astype(np.int64)
    offsets = np.zeros(captions + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    shares = 1 / np.arange(1, WORDS + 1)
    tokens = random.choice(WORDS, int(offsets[-1]), p=shares / shares.sum()).astype(np.int32)
    certain = np.repeat(np.arange(WORDS, dtype=np.int32), 4)[: len(tokens)]
    tokens[random.permutation(len(tokens))[: len(certain)]] = certain
    counts = np.bincount(tokens, minlength=WORDS)
    order = np.argsort(-counts, kind="stable")
    ranks = np.empty(WORDS, np.int32)
    ranks[order] = np.arange(WORDS, dtype=np.int32)
    tokens = ranks[tokens]
    counts = counts[order]
    counts = counts[counts > 0]  # in a small bench not all words occur
    words = [f"word{n}" for n in range(len(counts))]
    pieces = np.array(words, object)[tokens]
    texts = (
        " ".join(pieces[start:stop])
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    )
    table = CaptionTable(
        texts=Strings.pack(texts),
        rows=(np.arange(captions) * photos // captions).astype(np.int32),
        tokens=tokens,
        token_offsets=offsets,
        words=Strings.pack(words),
        counts=counts.astype(np.int64),
    )
    names = Strings.pack(f"{row:012d}.jpg" for row in range(photos))
    encoder = EncoderRecord(
        backbone="resnet152",
        weights="bench",
        weights_sha256="0" * 64,
        feature_dim=FEATURE_DIM,
        image_size=224,
        views=("full",),
        preprocessing="none",
        precision="float32",
    )
    skeleton = Skeleton(names, names, table, encoder, batch_rows=32)
    block = random.standard_normal((_WRITE_ROWS, 1, FEATURE_DIM)).astype(np.float16)
    digests = np.zeros((_WRITE_ROWS, DIGEST_BYTES), np.uint8)
    with open_writer(path, skeleton, library_versions={}) as writer:
        for start in range(0, photos, _WRITE_ROWS):
            count = min(_WRITE_ROWS, photos - start)
            writer.write(np.arange(start, start + count), block[:count], digests[:count])


def _first_step_s(cache: Path, run: Path, device: torch.device) -> float:
    """Seconds from starting `cap train` to its first log line."""
    started = time.perf_counter()
    command = [sys.executable, "-c", "from pipeline.cli.app import app; app()", "train"]
    command += ["--from-cache", str(cache), "--out", str(run), "--recipe", "classic"]
    command += ["--log-every", "1", "--device", str(device)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        try:
            for line in process.stderr:
                said.append(line)
                if "Step [1/" in line:
                    return time.perf_counter() - started
        finally:
            process.kill()
    raise RuntimeError(f"cap train ended before its first step: {''.join(said)}")


class _ClassicStep:
    """The tutorials' training step, from features on: the baseline."""

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        torch.manual_seed(0)
        self._model = CaptionDecoder(config).to(device).train()
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=CLASSIC.learning_rate)
        self._criterion = nn.CrossEntropyLoss()

    def __call__(self, batch: Batch) -> Tensor:
        model = self._model
        lengths = (batch.targets != PAD).sum(1).cpu()
        photo = model.read_photo(batch.features).unsqueeze(1)
        inputs = torch.cat([photo, model.embed(batch.inputs)], 1)
        packed = pack_padded_sequence(inputs, lengths, batch_first=True)
        targets = pack_padded_sequence(batch.targets, lengths, batch_first=True).data
        hidden, _ = model.lstm(packed)
        loss: Tensor = self._criterion(model.head(hidden.data), targets)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.detach()


def _time_steps(
    captions: CaptionSet,
    vocabulary: Vocabulary,
    device: torch.device,
    recipe: Recipe,
    precision: str,
    measurements: int,
    first_step_s: float,
) -> TrainBench:
    on_gpu = device.type == "cuda"
    batches = epoch_batches(captions.lengths, recipe.batch_size, seed=0, epoch=0)
    trainer = _trainer(captions, vocabulary, device, recipe, precision)
    before_mb = _own_memory_mb()
    epochs = itertools.cycle(range(recipe.epochs))
    steps = itertools.chain.from_iterable(map(trainer.epoch, epochs))
    measured_epoch_s = None
    if on_gpu:
        _take(steps, _GPU_WARM_UP)
        measured_epoch_s = _milliseconds(lambda: _take(steps, len(batches)), device) / 1e3
        row, classic_row = _GPU_ROW, _GPU_CLASSIC_ROW
    else:
        measurements = min(measurements, len(batches) // 2)
        _take(steps, measurements)  # sizes are met
        row = classic_row = 1
    beyond_mb = _own_memory_mb() - before_mb
    classic = _ClassicStep(DecoderConfig(captions.feature_dim, len(vocabulary)), device)
    classic_batches = (captions.batch(chosen) for chosen in itertools.cycle(batches))
    classic(captions.batch(batches[0]))

    def classic_steps() -> None:
        for batch in itertools.islice(classic_batches, classic_row):
            classic(batch)

    fast_ms, classic_ms = [], []
    for _ in range(measurements):
        fast_ms.append(_milliseconds(lambda: _take(steps, row), device) / row)
        classic_ms.append(_milliseconds(classic_steps, device) / classic_row)
    tokens = float(captions.lengths.sum()) / len(batches)
    rate = _product_rate(trainer, device, round(tokens))
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
        fast_step_ms=statistics.median(fast_ms),
        parts_ms=_parts_ms(trainer, batches[measurements], device),
        limit_step_ms=1e3 * _step_flops(objective.config, tokens, recipe.batch_size) / rate,
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
    config = DecoderConfig(
        captions.feature_dim,
        len(vocabulary),
        recipe.embedding_size,
        recipe.hidden_size,
        recipe.num_layers,
        dropout=recipe.dropout,
        feature_dropout=recipe.feature_dropout,
        tie_embeddings=recipe.tie_embeddings,
        photo_every_step=recipe.photo_every_step,
    )
    decoder = CaptionDecoder(config).to(device)
    return Trainer(decoder, captions, recipe, seed=0, precision=precision)


def _take(steps: Iterator[object], count: int) -> None:
    for _ in itertools.islice(steps, count):
        pass


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return 1e3 * (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step_flops(config: DecoderConfig, tokens: float, captions: int) -> float:
    """Of a step's matrix products: two for each weight and row, and twice as many backward."""
    hidden, embedding = config.hidden_size, config.embedding_size
    per_token = 4 * hidden * (embedding + hidden) + (config.num_layers - 1) * 8 * hidden * hidden
    if config.tie_embeddings:
        per_token += hidden * embedding + embedding * config.vocab_size
    else:
        per_token += hidden * config.vocab_size
    return 6.0 * (tokens * per_token + captions * config.feature_dim * embedding)


def _product_rate(trainer: Trainer, device: torch.device, tokens: int) -> float:
    """FLOP/s of the largest product of a step, the best of some runs."""
    config = trainer.decoder.config
    inner = config.embedding_size if config.tie_embeddings else config.hidden_size
    words = trainer.parameters.padded_words
    left = torch.randn(-(-tokens // 64) * 64, inner, device=device).to(trainer.objective.dtype)
    right = torch.randn(inner, words, device=device).to(trainer.objective.dtype)
    out = left @ right
    repeats = 20 if device.type == "cuda" else 1  # of one wait

    def products() -> None:
        for _ in range(repeats):
            multiply(left, right, out)

    best = min(_milliseconds(products, device) for _ in range(20)) / repeats
    return 2.0 * left.shape[0] * inner * words / (best / 1e3)


@torch.no_grad()
def _parts_ms(
    trainer: Trainer, chosen: NDArray[np.int64], device: torch.device
) -> dict[str, float]:
    """The parts of a fast step one by one, each the median of some runs on one batch."""
    captions = trainer.captions
    objective: Any = trainer.objective  # its parts are its own affair, but for us
    smoothing = objective.label_smoothing
    parts: dict[str, Callable[[], object]]
    if isinstance(objective, CudaObjective):
        on_device = torch.from_numpy(chosen).to(device)
        views = torch.full_like(on_device, captions.full_view)
        length = int(captions.lengths[chosen].max())
        parts = {
            "batch": lambda: gather_packed(captions, objective.kernels, on_device, views, length)
        }
        batch = gather_packed(captions, objective.kernels, on_device, views, length)
        buffers: tuple[Any, ...] = (objective._training,)
    else:
        parts = {"batch": lambda: pack(captions.batch(chosen), round_up=True)}
        batch = pack(captions.batch(chosen), round_up=True)
        buffers = ()
    count = batch.count()
    seed = None if device.type == "cuda" else 0
    config = trainer.decoder.config
    masks = draw_masks(config, batch, objective.dtype, seed)
    if config.dropout or config.feature_dropout:
        parts["dropout"] = lambda: draw_masks(config, batch, objective.dtype, seed)
    states = objective._hidden(batch, masks, *buffers, training=True)
    logits = objective._logits(states.before_head, *buffers)
    hidden = () if buffers else (states.before_head,)

    def cross_entropy() -> Any:
        return objective._cross_entropy(batch, logits, *hidden, None, smoothing, *buffers)

    def backward() -> None:
        objective._backward(batch, masks, states, logits, *smoothed)

    smoothed = () if buffers else (cross_entropy()[1] if smoothing else None,)
    parts |= {
        "lstm forward": lambda: objective._hidden(batch, masks, *buffers, training=True),
        "head forward": lambda: objective._logits(states.before_head, *buffers),
        "cross-entropy": cross_entropy,
        "backward": backward,
        "optimizer": lambda: trainer.optimizer.step(count),
    }
    return {name: _part_ms(part, device) for name, part in parts.items()}


def _part_ms(part: Callable[[], object], device: torch.device) -> float:
    """On a GPU as a graph, as in training: launched one by one, kernels wait for the host."""
    if device.type == "cpu":
        return statistics.median(_milliseconds(part, device) for _ in range(_PART_REPEATS))
    part()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        part()

    def replays() -> None:
        for _ in range(_GPU_ROW):
            graph.replay()

    return min(_milliseconds(replays, device) for _ in range(_PART_REPEATS)) / _GPU_ROW


def _own_memory_mb() -> float:
    """Memory of the process that is not a mapped file, in MB; 0 where the system does not say."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return 0.0
