"""The processes that train one model together, connected by `torch.distributed`.

All of them hold the same weights and go through the same batches. Each computes the gradients of
its share of a batch. One all-reduce adds them up, and all take the same optimizer step. Process 0
leads: it alone writes, prints and validates, and tells the others what to do.

There are three groups of connections: for sums (NCCL between GPUs, Gloo between CPUs), for what
process 0 tells (Gloo), and for the end (Gloo). On the last one a thread of each process waits for
the last word of the others. So a process learns at once that another one has ended or died,
whatever it is doing itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from train.device import is_out_of_memory
from train.model.flat_parameters import FlatParameters
from train.step.processes.launch import Launch, ProcessesError

# The others wait while process 0 validates or writes, however long that takes.
_NEVER = timedelta(days=1000)
_CONNECTING = timedelta(minutes=5)
# The last word of a process: one of these bytes, then a text.
_DONE, _STOP, _FAILED = 1, 2, 3
_WORD_BYTES = 1024
# A step that waits for the GPU of a process that has died waits for ever; this ends it.
_GRACE_S = 10.0
_ENDED = "another process of this training has ended"
_THEN = "--resume goes on from the last checkpoint, if one was saved"


class Processes:
    """Connected processes. `connect` makes it, in all of them at once; a context manager ends it.

    All methods but `share_of`, `own_seed` and `fail` must be called by all processes in the same
    order. They raise ProcessesError if another process has ended or failed.
    """

    def __init__(self, launch: Launch) -> None:
        """Use `connect`, whose errors have one line."""
        self.launch = launch
        self.rank, self.count = launch.rank, launch.count
        dist.init_process_group("gloo", timeout=_CONNECTING)
        self._told, self._ends = _new_group("gloo"), _new_group("gloo")
        self._sums = self._told  # until `use`
        self._on_gpu = False
        # Whether steps are under way, in which the device may wait for other processes.
        self.in_steps = False
        self._closed = threading.Event()  # this process has said its last word
        self._lost = threading.Event()  # another process has ended or failed
        self._failure = ""  # what it said
        others = range(1, self.count) if self.leads else (0,)
        self._listeners = [
            threading.Thread(target=self._listen, args=(other,), daemon=True) for other in others
        ]
        for listener in self._listeners:
            listener.start()

    @classmethod
    def connect(cls, launch: Launch) -> Processes:
        """Wait for all processes. Raises ProcessesError if they do not come."""
        if not dist.is_available():
            raise ProcessesError("this PyTorch was built without torch.distributed")
        try:
            return cls(launch)
        except (RuntimeError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), "")[:200]
            raise ProcessesError(
                f"process {launch.rank} of {launch.count} cannot reach the others ({reason})"
            ) from None

    def use(self, device: torch.device) -> None:
        """Connect for sums of tensors on this device, which must be of one kind everywhere."""
        self.wait_for_all()
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.set_device(device)
        with self._together():
            self._sums = _new_group("nccl" if self._on_gpu else "gloo")

    @property
    def leads(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def share_of(self, size: int) -> tuple[slice, bool]:
        """(this process's share of a batch of this size, whether it is idle).

        Every process takes each K-th caption. Of captions sorted by length, the shares are then
        equal work. If there are fewer captions than processes, an idle process computes the first
        one as well, with a weight of zero.
        """
        if self.rank < size:
            return slice(self.rank, size, self.count), False
        return slice(0, 1), True

    def own_seed(self, seed: int) -> int:
        """A seed for what has to be drawn differently in every process."""
        return int(np.random.SeedSequence((seed, self.rank)).generate_state(1)[0])

    def add_up(self, parameters: FlatParameters, loss: Tensor) -> Tensor:
        """Replace the gradients by their sums over all processes. Returns the sum of the losses.

        loss: a float32 scalar on the device.
        """
        whole = parameters.gradients_and_sums
        sums = whole[len(parameters.gradients) :]
        sums[0].copy_(loss)
        with self._together():
            dist.all_reduce(whole, group=self._sums)
        return sums[0].clone()

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over all processes."""
        together = torch.tensor(numbers, dtype=torch.float64)
        with self._together():
            dist.all_reduce(together, group=self._told)
        return together.tolist()

    def send_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors on the device with those of process 0."""
        with self._together():
            for tensor in tensors:
                dist.broadcast(tensor, 0, group=self._sums)

    def are_equal(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these float32 tensors have the same bits in all processes, by their checksums."""
        sums = []
        for tensor in tensors:
            bits = tensor.reshape(-1).view(torch.int32)
            # Of the first half, too, so that an exchange does not go unseen.
            sums += [part.sum(dtype=torch.int64) for part in (bits, bits[: len(bits) // 2])]
        return self.agree(torch.stack(sums).tolist())

    def agree(self, numbers: Sequence[int]) -> bool:
        """Whether these numbers, of 64 bits at most, are the same in all processes."""
        own = torch.tensor(numbers, dtype=torch.int64)
        least, most = own.clone(), own.clone()
        with self._together():
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self._told)
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self._told)
        return torch.equal(least, most)

    def tell(self, message: dict[str, Any]) -> None:
        """Process 0 tells the others something that JSON can say."""
        text = torch.tensor(list(json.dumps(message).encode()), dtype=torch.uint8)
        with self._together():
            dist.broadcast(torch.tensor([len(text)]), 0, group=self._told)
            dist.broadcast(text, 0, group=self._told)

    def hear(self) -> dict[str, Any]:
        """What process 0 tells next."""
        size = torch.zeros(1, dtype=torch.int64)
        with self._together():
            dist.broadcast(size, 0, group=self._told)
            text = torch.zeros(int(size), dtype=torch.uint8)
            dist.broadcast(text, 0, group=self._told)
        message: dict[str, Any] = json.loads(text.numpy().tobytes())
        return message

    def wait_for_all(self) -> None:
        """Return when all processes have come here."""
        self.sums([0.0])

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Work that fails if another process has ended."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            if self.leads and self._lost.wait(2.0):  # a last word may still be on its way
                raise ProcessesError(self._failure or _ENDED) from None
            reason = next(iter(str(error).splitlines()), "")[:200]
            raise ProcessesError(f"cannot exchange numbers with the others ({reason})") from None

    def _listen(self, other: int) -> None:
        """Wait for the last word of another process, in a thread."""
        word = torch.zeros(_WORD_BYTES, dtype=torch.uint8)
        try:
            dist.recv(word, other, group=self._ends)
        except RuntimeError:  # it has died
            if not self.leads and not self._closed.is_set():
                os._exit(1)
            self._lose("")
            return
        said = word.numpy().tobytes()
        if said[0] == _STOP:
            # The main thread may wait for process 0 for ever, and there is nothing to keep.
            os._exit(0)
        if said[0] == _FAILED:
            text = said[1:].rstrip(b"\0").decode(errors="replace")
            self._lose(f"process {other} of {self.count}: {text}")

    def _lose(self, failure: str) -> None:
        """Another process has ended. This one, which leads, ends too: by itself at the next sum, or
        here if it waits for a GPU that waits for the other's.
        """
        self._failure = self._failure or failure
        self._lost.set()
        waited_s = 0.0
        while waited_s < _GRACE_S:
            if self._closed.wait(0.5):
                return
            waited_s = waited_s + 0.5 if self.in_steps else 0.0
        # The main thread does not return from CUDA, so nothing else can say it.
        with contextlib.suppress(OSError):
            sys.stderr.write(f"error: {self._failure or _ENDED}; {_THEN}\n")
            sys.stderr.flush()
        os._exit(1)

    def fail(self, text: str) -> None:
        """Tell process 0 why this process ends."""
        with contextlib.suppress(RuntimeError):
            dist.send(_word(_FAILED, text), 0, group=self._ends)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Process 0 lets the others go: in peace if training is done, else at once."""
        self._closed.set()
        done = kind is None
        if not done and not self.leads:
            return  # its process ends
        for other in range(1, self.count) if self.leads else (0,):
            with contextlib.suppress(RuntimeError):
                dist.send(_word(_DONE if done else _STOP), other, group=self._ends)
        for listener in self._listeners:
            listener.join(5.0)
        # A GPU may still wait for a process that has gone, and NCCL then waits for it.
        if done or not self._on_gpu:
            dist.destroy_process_group()


def _new_group(backend: str) -> dist.ProcessGroup:
    """A group of connections between all processes."""
    group = dist.new_group(backend=backend, timeout=_NEVER)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _word(kind: int, text: str = "") -> Tensor:
    said = bytes([kind]) + text.encode("utf-8", "backslashreplace")[: _WORD_BYTES - 1]
    return torch.tensor(list(said.ljust(_WORD_BYTES, b"\0")), dtype=torch.uint8)
