"""A job on a cluster: hands out shards, and decides what becomes of those whose worker dies.

The finished shards in the job's folder are the memory of what is done; nothing else has to survive.
The engine only starts workers and carries messages (`pool.py`), so what is retried, how often, and
what a failure means is decided here.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from cache.derived.catalogue import write_catalogue
from cache.derived.shards import is_catalogue
from cache.merge import merge
from cache.record import CacheError, EncoderRecord
from cache.store import DONE, UNREADABLE, open_cache
from cache.writer import check_place
from pipeline.captions.photos import Photos
from pipeline.extraction.config import ExtractConfig
from pipeline.extraction.distributed.config import RayOptions
from pipeline.extraction.distributed.job import (
    JobRecord,
    Shards,
    folder_of,
    is_made,
    places_of,
    remove_job,
    shard_count,
)
from pipeline.extraction.distributed.lock import JobLock
from pipeline.extraction.distributed.messages import (
    Chosen,
    Damaged,
    Died,
    Ended,
    Failed,
    Filled,
    Finished,
    Here,
    Loaded,
    Message,
    Said,
    Settings,
)
from pipeline.extraction.distributed.pool import Ask, ClusterError, Node, RayPool, ask_for
from pipeline.extraction.extract import (
    BATCH_PHOTOS,
    PRECISION_PHOTOS,
    digests_of,
    open_asked,
    read_asked,
)
from pipeline.extraction.fill import Notice
from pipeline.photos.sources.places import is_address
from pipeline.photos.sources.source import Source

_DEATHS = 3  # of workers at the same place of a shard
_FAILURES = 2  # of a shard, the second one after all others
_FAILED_IN_A_ROW = 2  # shards, until a worker is taken for the reason, if there are others
_ALL_FAIL = 8  # shards in a row, until something that all have in common is taken for the reason
_LOST_STARTS = 3  # workers that die before they have loaded, one after the other
_SOON_S = 15.0  # until the user is told that no worker has started
_WAIT_S = 60.0
_TICK_S = 1.0


@dataclass(frozen=True)
class ClusterProgress:
    """How far a job is, counting all runs so far."""

    done: int
    unreadable: int
    total: int
    new: int  # photos of this run
    elapsed_s: float  # of this run, since the first shard was handed out
    photos_per_s: float
    shards_done: int
    shards: int
    workers: int  # that are at work
    cost: float | None  # of this run's workers, if the user has said what they cost


class Pool(Protocol):
    """What a job needs of an engine: see `RayPool`."""

    def nodes(self) -> list[Node]: ...
    def in_words(self) -> str: ...
    def start(self, ask: Ask, settings: Settings) -> list[int]: ...
    def add(self) -> int: ...
    def call(self, worker: int, method: str, *arguments: object) -> None: ...
    def wait(self, timeout_s: float) -> list[tuple[int, Message]]: ...
    def end(self, worker: int) -> None: ...
    def worker_seconds(self) -> float: ...


def extract_on_cluster(
    config: ExtractConfig, options: RayOptions
) -> Generator[Notice | ClusterProgress, None, None]:
    """Make a cache by many workers, or go on with one that was begun so.

    Yields notices and progress; the last item is the final progress. Closing the generator ends the
    workers, and keeps what is done. Raises ClusterError, also at the end if shards have
    failed; CacheError; and what `read_asked` raises.
    """
    assert options.ray is not None
    config = _absolute(config)
    folder = folder_of(config.out)
    lock = JobLock(folder)
    if (line := lock.waits()) is not None:
        yield Notice(line)
    with lock:
        if not is_catalogue(config.out):
            check_place(config.out)
        asked = replace(config, out=folder / "shard.h5")
        source = open_asked(asked)
        photos, understood = read_asked(asked, source)
        yield from map(Notice, understood)
        digests = digests_of(photos)
        if is_made(config, len(photos), digests):
            if open_cache(config.out).shards is None:  # else it is a catalogue of them
                remove_job(folder)  # a run that was killed at its very end may have left it
            yield Notice(f"{config.out} is made already")
            yield _of_result(config.out)
            return
        with RayPool(options.ray) as pool:
            job = ClusterJob(config, options, source, photos, digests, pool, lock)
            yield from job.run()
            progress = job.progress()
        shards = job.shards
        assert shards is not None
        yield Notice("all shards are done; joining them", detail=True)
        if options.catalogue:
            write_catalogue(shards.paths(), config.out, overwrite=config.overwrite)
        else:
            merge(shards.paths(), config.out, overwrite=config.overwrite)
            remove_job(folder)
        yield progress


def _absolute(config: ExtractConfig) -> ExtractConfig:
    """The settings with whole paths, which mean the same on every machine."""
    weights = config.weights
    if os.path.isfile(weights):
        weights = os.path.abspath(weights)
    images = config.images
    return replace(
        config,
        images=images if is_address(str(images)) else Path(os.path.abspath(images)),
        out=Path(os.path.abspath(config.out)),
        weights=weights,
    )


def _of_result(out: Path) -> ClusterProgress:
    cache = open_cache(out)
    done, unreadable = (int((cache.status == kind).sum()) for kind in (DONE, UNREADABLE))
    return ClusterProgress(done, unreadable, len(cache), 0, 0.0, 0.0, 0, 0, 0, None)


@dataclass
class _Worker:
    """What the job knows of a worker."""

    host: str = ""  # empty until it runs
    loaded: bool = False
    doing: str = "place"  # the method that it was called with; empty if it is idle
    shard: int = 0  # at which it is
    filled: Filled | None = None  # of this shard, in this call
    failed_at: set[int] = field(default_factory=set)  # shards
    failed_in_a_row: int = 0


class ClusterJob:
    """One run of a job, from the first worker's start to the last shard's end."""

    def __init__(
        self,
        config: ExtractConfig,
        options: RayOptions,
        source: Source,
        photos: Photos,
        digests: tuple[str, str],
        pool: Pool,
        lock: JobLock,
    ) -> None:
        """digests: of all photos and captions."""
        self._config, self._options = config, options
        self._source, self._photos, self._digests = source, photos, digests
        self._pool, self._lock = pool, lock
        self._folder = folder_of(config.out)
        self._asked = Ask(1, 1.0, 0.0)
        self._workers: dict[int, _Worker] = {}
        self._base: EncoderRecord | None = None  # of the first worker, without precision
        self._device = "cpu"  # its type
        self._versions: dict[str, str] = {}  # of its libraries
        self._precision: str | None = None
        self._queue: deque[tuple[str, int]] = deque()  # (method, shard)
        self._deaths: dict[int, tuple[int, int]] = {}  # of a shard: (how many, at which photo)
        self._errors: dict[int, int] = {}
        self._failed: dict[int, str] = {}
        self._failed_in_a_row = 0
        self._finished: dict[int, Finished] = {}
        self._filled: dict[int, Filled] = {}  # of shards that are not finished
        self._new = 0  # photos of calls that have ended
        self._refused = 0  # workers that cannot work
        self._last_refusal = "no worker could start"
        self._lost_starts = 0
        self._told: set[str] = set()  # what is said once
        self._asked_since = self._none_since = 0.0
        self._start: float | None = None
        self.shards: Shards | None = None

    def run(self) -> Generator[Notice | ClusterProgress, None, None]:
        """Work until every shard is finished or has failed. Raises as `extract_on_cluster`."""
        ask = self._ask()
        self._asked = ask
        yield Notice(f"{ask}; {self._pool.in_words()}", detail=True)
        settings = Settings(
            replace(self._config, device="cuda" if ask.gpus else "cpu"),
            self._folder,
            self._source.label,
            self._lock.token,
            ask.cpus,
        )
        for number in self._pool.start(ask, settings):
            self._workers[number] = _Worker()
        self._asked_since = self._none_since = time.monotonic()
        while self.shards is None or self._queue or self._at_work():
            for worker, message in self._pool.wait(_TICK_S):
                if worker in self._workers:  # not one that was ended meanwhile
                    yield from self._take(worker, message)
            self._lock.check()
            if self.shards is None:
                yield from self._settle()
            self._fit_pool()
            if not self._workers and (self.shards is None or self._queue):
                raise ClusterError(self._last_refusal)
            yield from self._waiting()
            if self.shards is not None:
                yield self.progress()
        if self._failed:
            count = self.shards.record.shards
            names = ", ".join(f"{number}/{count}" for number in sorted(self._failed))
            raise ClusterError(
                f"{len(self._failed)} of {count} shards failed: {names}; the others are kept in "
                f"{self._folder}, run the same command again for the rest"
            )

    def progress(self) -> ClusterProgress:
        """How far the job is."""
        assert self.shards is not None
        elapsed_s = 0.0 if self._start is None else time.monotonic() - self._start
        parts: list[Finished | Filled] = [*self._finished.values(), *self._filled.values()]
        running = (worker.filled for worker in self._workers.values())
        new = self._new + sum(filled.new for filled in running if filled is not None)
        price = self._options.cost_per_hour
        return ClusterProgress(
            done=sum(part.done for part in parts),
            unreadable=sum(part.unreadable for part in parts),
            total=len(self._photos),
            new=new,
            elapsed_s=elapsed_s,
            photos_per_s=new / elapsed_s if elapsed_s > 0 else 0.0,
            shards_done=len(self._finished),
            shards=self.shards.record.shards,
            workers=self._at_work(),
            cost=None if price is None else price * self._pool.worker_seconds() / 3600,
        )

    def _ask(self) -> Ask:
        options, device = self._options, self._config.device
        if device not in ("auto", "cpu", "cuda"):
            raise ClusterError(f"--device {device}: with --ray, it is auto, cpu or cuda")
        if device == "cpu" and options.ray_gpus:
            raise ClusterError(f"--ray-gpus {options.ray_gpus:g} needs --device auto or cuda")
        ask = ask_for(
            self._pool.nodes(),
            workers=options.ray_workers,
            gpus=0.0 if device == "cpu" else options.ray_gpus,
            cpus=options.ray_cores,
        )
        if device == "cuda" and not ask.gpus:
            raise ClusterError(f"--device cuda: {self._pool.in_words()}")
        batch = self._config.batch_size or BATCH_PHOTOS["cuda" if ask.gpus else "cpu"]
        return replace(ask, workers=min(ask.workers, -(-len(self._photos) // batch)))

    def _at_work(self) -> int:
        """How many workers are at a shard."""
        return sum(worker.shard > 0 for worker in self._workers.values())

    def _waiting(self) -> Iterator[Notice]:
        """Say what has not started; raise ClusterError if nothing has for long enough."""
        now = time.monotonic()
        started = sum(bool(worker.host) for worker in self._workers.values())
        if started:
            self._none_since = now
        if started == len(self._workers):
            return
        there = f"asked for {self._asked}; {self._pool.in_words()}"
        limit_s = self._options.ray_wait or _WAIT_S
        waited_s = now - self._none_since
        if waited_s > limit_s:
            raise ClusterError(f"no worker could start within {limit_s:g} s: {there}")
        if waited_s > min(_SOON_S, limit_s / 2) and "none" not in self._told:
            self._told.add("none")
            yield Notice(f"no worker has started yet: {there}")
        if started and now - self._asked_since > _SOON_S and "some" not in self._told:
            self._told.add("some")
            yield Notice(
                f"{started} of {len(self._workers)} workers have started, the others join when "
                f"they can: {there}"
            )

    def _take(self, number: int, message: Message) -> Iterator[Notice]:
        """Act on a message of a worker."""
        worker = self._workers[number]
        if isinstance(message, Here):
            worker.host = message.host
            yield Notice(f"a worker on {message.host}, process {message.pid}", detail=True)
        elif isinstance(message, Loaded):
            yield from self._loaded(number, message)
        elif isinstance(message, Chosen):
            self._precision = message.precision
            yield from map(Notice, message.notices)
            yield from (Notice(text, detail=True) for text in message.details)
        elif isinstance(message, Said):
            yield from self._once(message.text, message.detail)  # each says it of each shard
        elif isinstance(message, Filled):
            worker.filled = self._filled[worker.shard] = message
        elif isinstance(message, Finished):
            self._finished[worker.shard] = message
            self._filled.pop(worker.shard, None)
            self._new += message.new
            worker.filled, worker.shard = None, 0
            worker.failed_in_a_row = self._failed_in_a_row = 0
        elif isinstance(message, Damaged):
            yield Notice(f"{self._name(worker.shard)} is made again: {message.reason}")
            assert self.shards is not None
            self.shards.path(worker.shard).unlink(missing_ok=True)
            self._queue.append(("work", worker.shard))
            worker.shard = 0
        elif isinstance(message, Failed):
            yield from self._take_failure(number, message)
        elif isinstance(message, Died):
            yield from self._take_death(number, message)
        elif isinstance(message, Ended):
            done, worker.doing = worker.doing, ""
            if done == "place":
                self._call(number, "load")

    def _loaded(self, number: int, message: Loaded) -> Iterator[Notice]:
        worker = self._workers[number]
        worker.loaded, self._lost_starts = True, 0
        if self._base is None:
            self._base, self._device = message.record, message.device
            self._versions = message.versions
            yield from map(Notice, message.notices)
            yield from (Notice(text, detail=True) for text in message.details)
            return
        difference = message.record.difference(self._base)
        if difference is not None:
            yield from self._refuse(number, f"{worker.host}: has {difference} as on the others")
        for name, version in message.versions.items():
            usual = self._versions[name]
            if version != usual:
                yield from self._once(
                    f"{worker.host}: {name} {version}, on other machines {usual}; the last bits of "
                    "features may differ"
                )

    def _once(self, text: str, detail: bool = False) -> Iterator[Notice]:
        if text not in self._told:
            self._told.add(text)
            yield Notice(text, detail)

    def _settle(self) -> Iterator[Notice]:
        """When there is an encoder, settle what all shards have in common."""
        if self._base is None:
            return
        if self._precision is None:
            self._precision = self._known_precision()
        if self._precision is not None:
            yield from self._begin()
        elif not any(worker.doing == "choose" for worker in self._workers.values()):
            for number, worker in self._workers.items():
                if worker.loaded and not worker.doing:
                    first = self._photos[:PRECISION_PHOTOS]
                    self._call(number, "choose", first, places_of(first, self._source))
                    break

    def _known_precision(self) -> str | None:
        if self._config.precision != "auto":
            return self._config.precision
        earlier = None if self._config.overwrite else JobRecord.read(self._folder)
        return None if earlier is None else earlier.encoder.precision

    def _call(self, number: int, method: str, *arguments: object) -> None:
        self._workers[number].doing = method
        self._pool.call(number, method, *arguments)

    def _begin(self) -> Iterator[Notice]:
        """Settle what all shards have in common, and line them up."""
        assert self._base is not None
        assert self._precision is not None
        config, photos = self._config, self._photos
        earlier = None
        try:
            earlier = JobRecord.read(self._folder)
        except CacheError:
            if not config.overwrite:
                raise
        encoder = replace(self._base, precision=self._precision)

        def settled(like: JobRecord | None) -> JobRecord:
            """like: the job whose choices are taken where the user has made none."""
            batch = config.batch_size or (like.batch_rows if like else BATCH_PHOTOS[self._device])
            batch_rows = min(batch, len(photos))
            asked = self._options.ray_shards or (like.shards if like else None)
            workers = self._asked.workers
            return JobRecord(
                photos=len(photos),
                all_photos_sha256=self._digests[0],
                all_captions_sha256=self._digests[1],
                tokenizer=config.tokenizer,
                shards=shard_count(len(photos), batch_rows, workers, self._device, asked),
                batch_rows=batch_rows,
                encoder=encoder,
            )

        same_photos = earlier is not None and earlier.all_photos_sha256 == self._digests[0]
        record = settled(earlier if same_photos else None)
        difference = None if earlier is None else earlier.difference(record)
        if difference is not None and not config.overwrite:
            raise CacheError(
                f"{self._folder}: was begun with {difference}. Use another --out, or --overwrite."
            )
        if earlier is None or difference is not None:
            remove_job(self._folder)  # but for the lock
            record.write(self._folder)
        elif config.overwrite:
            yield Notice(f"going on with {self._folder}, which this command has begun")
        self.shards = Shards(self._folder, record, photos, self._source)
        for number in range(1, record.shards + 1):
            there = self.shards.is_there(number)
            self._queue.append(("check" if there else "work", number))
        found = sum(method == "check" for method, _ in self._queue)
        if found:
            yield Notice(f"{found:,} of {record.shards:,} shards are done; checking them")
        if self._refused:
            yield Notice(f"{self._refused} workers cannot work, for example {self._last_refusal}")
        self._start = time.monotonic()

    def _fit_pool(self) -> None:
        """Hand out shards to idle workers; have as many workers as there is work for."""
        wanted = self._asked.workers
        if self.shards is not None:
            for number, worker in list(self._workers.items()):
                if not worker.loaded or worker.doing:
                    continue
                if not self._queue:
                    self._pool.end(number)
                    del self._workers[number]
                    continue
                next_one = self._next_for(worker)
                if next_one is None:
                    continue
                self._queue.remove(next_one)
                method, worker.shard = next_one
                task = self.shards.task(
                    worker.shard, with_photos=method == "work" or self._config.overwrite
                )
                self._call(number, method, task, self.shards.record.encoder)
            wanted = min(wanted, len(self._queue) + self._at_work())
            if not wanted:
                return
        if self._lost_starts < _LOST_STARTS:
            # As many as were refused stay away: their machine would refuse again.
            for _ in range(wanted - len(self._workers) - self._refused):
                self._workers[self._pool.add()] = _Worker()

    def _next_for(self, worker: _Worker) -> tuple[str, int] | None:
        """What a worker does next. It tries no shard twice, if others can work."""
        if sum(other.loaded for other in self._workers.values()) == 1:
            return self._queue[0]
        return next((each for each in self._queue if each[1] not in worker.failed_at), None)

    def _take_failure(self, number: int, message: Failed) -> Iterator[Notice]:
        worker = self._workers[number]
        for line in message.trace.splitlines():
            yield Notice(line, detail=True)
        shard, worker.shard = worker.shard, 0
        if not shard:
            yield from self._refuse(number, f"{worker.host}: {message.reason}")
            return
        self._close_call(worker)
        worker.failed_at.add(shard)
        worker.failed_in_a_row += 1
        self._failed_in_a_row += 1
        self._errors[shard] = self._errors.get(shard, 0) + 1
        if self._failed_in_a_row >= max(_ALL_FAIL, 2 * self._asked.workers):
            raise ClusterError(
                f"{self._failed_in_a_row} times in a row, a shard has failed, at last "
                f"{self._name(shard)}: {message.reason}; what is done is kept in {self._folder}"
            )
        if self._errors[shard] < _FAILURES:
            self._queue.append(("work", shard))
            yield Notice(f"{self._name(shard)}: {message.reason}; it is tried again at the end")
        else:
            yield from self._fail(shard, message.reason)
        others = any(other.loaded for n, other in self._workers.items() if n != number)
        if worker.failed_in_a_row >= _FAILED_IN_A_ROW and others:
            yield from self._refuse(number, f"{worker.host}: {message.reason}")

    def _refuse(self, number: int, reason: str) -> Iterator[Notice]:
        """A worker that cannot work is ended, and not replaced."""
        self._pool.end(number)
        del self._workers[number]
        self._refused += 1
        self._last_refusal = reason
        if self.shards is not None:
            yield Notice(f"a worker cannot work: {reason}")

    def _take_death(self, number: int, message: Died) -> Iterator[Notice]:
        worker = self._workers.pop(number)
        host = f" on {worker.host}" if worker.host else ""
        if not worker.shard:
            self._lost_starts += 1
            self._last_refusal = f"a worker{host} ended while it started: {message.reason}"
            yield Notice(self._last_refusal)
            return
        shard = worker.shard
        filled = self._filled.get(shard)
        at = 0 if filled is None else filled.done + filled.unreadable
        self._close_call(worker)
        deaths, before = self._deaths.get(shard, (0, -1))
        deaths = deaths + 1 if at <= before else 1
        self._deaths[shard] = deaths, at
        if deaths >= _DEATHS:
            yield from self._fail(shard, f"its worker died {deaths} times; last: {message.reason}")
            return
        again = ("work" if worker.doing == "work" else "check", shard)
        self._queue.appendleft(again) if deaths == 1 else self._queue.append(again)
        yield Notice(f"a worker{host} died at {self._name(shard)}, which goes on: {message.reason}")

    def _close_call(self, worker: _Worker) -> None:
        if worker.filled is not None:
            self._new += worker.filled.new
            worker.filled = None

    def _fail(self, shard: int, reason: str) -> Iterator[Notice]:
        self._failed[shard] = reason
        self._filled.pop(shard, None)
        yield Notice(f"{self._name(shard)} failed: {reason}")

    def _name(self, shard: int) -> str:
        assert self.shards is not None
        return f"shard {shard}/{self.shards.record.shards}"
