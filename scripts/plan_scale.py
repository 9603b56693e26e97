"""Plan an extraction of very many photos: hours and cost on 1, 8 and 64 GPUs, and what binds.

    python scripts/plan_scale.py --photos 100000000 --price 4

The shards are handed out as `cap extract-features --ray` does it. Their work is simulated event by
event: stragglers (the time of a shard is lognormal), workers that fail (exponentially) and are
replaced, the start of workers and of shards, and storage whose bandwidth all workers share. A plan
is the mean of some seeds. Nothing is measured here: rates and bandwidths are arguments, and their
defaults are those of `docs/scale-plan.md`. Prints Markdown.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import deque
from dataclasses import dataclass, replace
from typing import Annotated

import typer

from pipeline.extraction.distributed.job import shard_count

_BATCH = 256  # of a GPU
_NEVER_S = 1e15


@dataclass(frozen=True)
class Plan:
    """What is assumed. Times in seconds, bandwidths in bytes per second."""

    photos: int = 100_000_000
    gpus: int = 8
    gpu_photos_per_s: float = 8000.0
    photo_bytes: float = 140e3
    storage_bytes_per_s: float = 10e9  # to all workers together
    network_bytes_per_s: float = 3e9  # to one worker
    sigma: float = 0.2  # of the logarithm of a shard's time
    failure_s: float = 24 * 3600.0  # mean time between failures of one worker; inf for none
    replace_s: float = 120.0  # until a failed worker's successor begins to start
    start_s: float = 15.0  # of a worker: its process, PyTorch, the encoder
    shard_start_s: float = 2.0  # of each shard: its names, its file, the first photos
    tokenized_per_s: float = 100_000.0  # photos, whose captions a worker splits before each shard
    flush_s: float = 2.0  # work that a killed worker loses

    def opening_s(self, photos: float) -> float:
        """Of a shard of so many photos, until its first batch."""
        return self.shard_start_s + photos / self.tokenized_per_s

    @property
    def shards(self) -> int:
        return shard_count(self.photos, _BATCH, self.gpus, "cuda", None)


@dataclass(frozen=True)
class Outcome:
    """What a simulated run took."""

    seconds: float  # from asking for workers to the last shard's end
    worker_s: float  # of all workers, from their start to the end of their work
    failures: int
    redone: float  # photos
    storage_bound: float  # share of the time in which storage or network was slower than the GPUs


@dataclass
class _Worker:
    """One slot for a worker: the process in it may be replaced."""

    phase: str  # starting, opening (a shard), working, down (until it is replaced), away
    until: float  # the end of the phase; infinite while it works or is away
    fails: float  # when its process fails
    began: float = 0.0  # when its process was started
    left: float = 0.0  # photos of the shard at hand
    slowness: float = 1.0  # of this shard
    rate: float = 0.0  # photos per second, at the moment

    def next_event(self, now: float) -> float:
        """When its phase ends, or its process fails."""
        ends = now + self.left / self.rate if self.phase == "working" else self.until
        return min(ends, self.fails)


def simulate(plan: Plan, seed: int) -> Outcome:
    """One run. The same seed gives the same run."""
    chance = random.Random(seed)
    size, rest = divmod(plan.photos, plan.shards)
    queue = deque(float(size + (n < rest)) for n in range(plan.shards))
    now = worker_s = redone = bound_s = 0.0
    failures = 0

    def start(worker: _Worker) -> None:
        worker.phase, worker.began, worker.until = "starting", now, now + plan.start_s
        until_failure_s = -math.log(1.0 - chance.random()) * min(plan.failure_s, _NEVER_S)
        worker.fails = now + until_failure_s

    def take(worker: _Worker) -> None:
        """The next shard. Where there is none, the worker ends, and its machine is free."""
        nonlocal worker_s
        if not queue:
            worker_s += now - worker.began
            worker.phase, worker.until, worker.fails = "away", math.inf, math.inf
            return
        worker.left = queue.popleft()
        worker.phase, worker.until = "opening", now + plan.opening_s(worker.left)
        # The mean is 1, whatever the spread.
        worker.slowness = math.exp(plan.sigma * chance.gauss(0.0, 1.0) - plan.sigma**2 / 2)

    def fail(worker: _Worker) -> None:
        nonlocal failures, worker_s, redone
        failures += 1
        worker_s += now - worker.began
        if worker.phase in ("opening", "working"):
            lost = worker.rate * plan.flush_s if worker.phase == "working" else 0.0
            redone += lost
            queue.appendleft(worker.left + lost)
        worker.phase, worker.until, worker.fails = "down", now + plan.replace_s, math.inf

    workers = [_Worker("starting", 0.0, 0.0) for _ in range(plan.gpus)]
    for worker in workers:
        start(worker)
    while queue or any(worker.phase in ("opening", "working") for worker in workers):
        working = [worker for worker in workers if worker.phase == "working"]
        _share_storage(plan, working)
        step = min(worker.next_event(now) for worker in workers) - now
        if any(w.rate < 0.999 * plan.gpu_photos_per_s / w.slowness for w in working):
            bound_s += step
        now += step
        for worker in working:
            worker.left -= worker.rate * step
        for worker in workers:
            if worker.fails <= now:
                fail(worker)
            elif worker.phase == "working" and worker.left < 1e-3:  # photos: rounding
                take(worker)
            elif worker.until <= now:
                if worker.phase == "starting":
                    take(worker)
                elif worker.phase == "opening":
                    worker.phase, worker.until = "working", math.inf
                else:
                    start(worker)
        for worker in workers:  # the shard of one that failed needs another worker
            if queue and worker.phase == "away":
                start(worker)
                break
    for worker in workers:
        worker_s += 0.0 if worker.phase in ("away", "down") else now - worker.began
    return Outcome(now, worker_s, failures, redone, bound_s / now)


def _share_storage(plan: Plan, working: list[_Worker]) -> None:
    """Set the rates: each worker's own limit, or a fair share of what the storage delivers."""
    network = plan.network_bytes_per_s / plan.photo_bytes
    wanted = {id(w): min(plan.gpu_photos_per_s / w.slowness, network) for w in working}
    left = plan.storage_bytes_per_s / plan.photo_bytes
    for place, worker in enumerate(sorted(working, key=lambda w: wanted[id(w)])):
        worker.rate = min(wanted[id(worker)], left / (len(working) - place))
        left -= worker.rate


def without_chance(plan: Plan) -> float:
    """Seconds without stragglers, failures and limits of storage: waves of equal shards."""
    waves = math.ceil(plan.shards / plan.gpus)
    size = plan.photos / plan.shards
    return plan.start_s + waves * (plan.opening_s(size) + size / plan.gpu_photos_per_s)


@dataclass(frozen=True)
class Serial:
    """What one machine does before and after, at these rates."""

    read_photos_per_s: float  # names and captions
    feature_bytes: int
    merge_bytes_per_s: float  # of features, read and written

    def before_s(self, photos: int) -> float:
        return photos / self.read_photos_per_s

    def after_s(self, photos: int) -> float:
        return photos * self.feature_bytes / self.merge_bytes_per_s


def row(plan: Plan, serial: Serial, price: float, seeds: int) -> str:
    """One line of the table."""
    runs = [simulate(plan, seed) for seed in range(seeds)]
    seconds = statistics.mean(run.seconds for run in runs)
    worst = max(run.seconds for run in runs)
    gpu_hours = statistics.mean(run.worker_s for run in runs) / 3600
    bound = statistics.mean(run.storage_bound for run in runs)
    failures = statistics.mean(run.failures for run in runs)
    needed = plan.gpus * min(plan.gpu_photos_per_s * plan.photo_bytes, plan.network_bytes_per_s)
    around = serial.before_s(plan.photos) + serial.after_s(plan.photos)
    cells = (
        f"{plan.gpus}",
        f"{plan.storage_bytes_per_s / 1e9:g} GB/s",
        f"{plan.photos / seconds:,.0f}",
        f"{_hours(seconds)} ({_hours(worst)})",
        _hours(without_chance(plan)),
        f"{needed / 1e9:.1f} GB/s",
        f"{bound:.0%}",
        f"{failures:.1f}",
        f"{gpu_hours:,.1f}",
        f"{gpu_hours * price:,.0f}",
        _hours(seconds + around),
    )
    return f"| {' | '.join(cells)} |"


def _hours(seconds: float) -> str:
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


HEADER = (
    "| GPUs | storage | photos/s | extraction (worst seed) | without chance | GPUs could read "
    "| storage binds | failures | GPU hours | cost | with names, captions, merge |\n"
    f"|{'---|' * 11}"
)


def main(
    photos: Annotated[int, typer.Option(min=1, help="Number of photos.")] = 100_000_000,
    gpus: Annotated[str, typer.Option(help="Comma-separated numbers of GPUs.")] = "1,8,64",
    rate: Annotated[float, typer.Option(help="Photos per second of one GPU.")] = 8000.0,
    photo_kb: Annotated[float, typer.Option(help="Size of a photo's file in kB.")] = 140.0,
    storage: Annotated[str, typer.Option(help="GB/s to all workers, comma-separated.")] = "10,100",
    network: Annotated[float, typer.Option(help="GB/s to one worker.")] = 3.0,
    price: Annotated[float, typer.Option(help="Of a GPU and its machine, per hour.")] = 4.0,
    sigma: Annotated[float, typer.Option(help="Spread of a shard's time, lognormal.")] = 0.2,
    failure_h: Annotated[float, typer.Option(help="Hours between a worker's failures.")] = 24.0,
    read_rate: Annotated[
        float, typer.Option(help="Photos per second whose names and captions the driver reads.")
    ] = 17_000.0,
    tokenize: Annotated[
        float, typer.Option(help="Photos per second whose captions a worker splits into tokens.")
    ] = 100_000.0,
    features: Annotated[int, typer.Option(help="Numbers per photo, of two bytes.")] = 2048,
    merge: Annotated[float, typer.Option(help="GB/s of features that a merge copies.")] = 0.5,
    seeds: Annotated[int, typer.Option(min=1, help="Simulated runs of each row.")] = 20,
) -> None:
    plan = Plan(
        photos=photos,
        gpu_photos_per_s=rate,
        photo_bytes=photo_kb * 1e3,
        network_bytes_per_s=network * 1e9,
        sigma=sigma,
        failure_s=failure_h * 3600,
        tokenized_per_s=tokenize,
    )
    serial = Serial(read_rate, 2 * features, merge * 1e9)
    print(HEADER)
    for count in gpus.split(","):
        for speed in storage.split(","):
            each = replace(plan, gpus=int(count), storage_bytes_per_s=float(speed) * 1e9)
            print(row(each, serial, price, seeds))
    print(
        f"\nBefore: {_hours(serial.before_s(photos))} for names and captions. "
        f"After: {_hours(serial.after_s(photos))} for the merge."
    )


if __name__ == "__main__":
    typer.run(main)
