"""One job at a time in a folder, also where file locks do not reach from machine to machine.

The lock is a locked file. It says who holds it, and its date is renewed every few seconds: where
another machine's lock is not seen, a date that moves says that the holder lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from cache.atomic import still_named
from cache.record import CacheError

LOCK_NAME = "driver.lock"
BEAT_S = 4.0
_DEAD_S = 3.5 * BEAT_S  # of no beat: the holder is dead


class JobLock:
    """The lock of a folder, from `with` to its end. It is also released when the process dies."""

    def __init__(
        self,
        folder: Path,
        *,
        beat_s: float = BEAT_S,
        dead_s: float = _DEAD_S,
    ) -> None:
        """Times are arguments for tests."""
        self._path = folder / LOCK_NAME
        self._beat_s, self._dead_s = beat_s, dead_s
        self.token = secrets.token_hex(16)
        self._stopped = threading.Event()
        self._lost = False
        self._fd = -1
        self._has_locks = True  # the file system

    def __enter__(self) -> Self:
        """Raises CacheError if another job holds it, or if the folder cannot be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = self._locked()
            self._check_holder()
            text = {"host": socket.gethostname(), "pid": os.getpid(), "kernel": _kernel()}
            data = json.dumps({**text, "token": self.token}).encode()
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, data, 0)
            os.fsync(self._fd)
        except OSError as error:
            self._close()
            raise CacheError(f"{self._path}: cannot write ({error.strerror})") from None
        except CacheError:
            self._close()
            raise
        self._beats = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._beats.start()
        return self

    def waits(self) -> str | None:
        """One line if entering takes some seconds: another machine's job was here last."""
        if self._holder().get("kernel", _kernel()) == _kernel():
            return None
        return f"{self._path.parent}: looking whether {self._holder_in_words()} is still at work"

    def check(self) -> None:
        """Raise CacheError if another job has taken the lock, as after a long standstill."""
        if self._lost:
            raise CacheError(
                f"{self._path.parent}: another job has taken it over, {self._holder_in_words()}"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._beats.join()
        with contextlib.suppress(OSError):
            if self._holder().get("token") == self.token:
                self._path.unlink()  # while it is locked
                self._path.parent.rmdir()  # if nothing was begun
        self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _locked(self) -> int:
        """The descriptor of the file, locked if the file system has locks."""
        attempt = 0
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                raise self._busy() from None
            except OSError:  # no locks here: the date must do
                self._has_locks = False
                return fd
            with contextlib.suppress(FileNotFoundError):
                if still_named(fd, self._path, attempt):
                    return fd
            os.close(fd)
            attempt += 1

    def _check_holder(self) -> None:
        """Raise CacheError if a holder on another machine lives, whose lock is not seen here."""
        holder = self._holder()
        if not holder or (self._has_locks and holder.get("kernel") == _kernel()):
            return  # on this machine, the lock itself tells
        before = os.stat(self._path).st_mtime_ns
        end = time.monotonic() + self._dead_s
        while time.monotonic() < end:
            time.sleep(self._beat_s / 4)
            if os.stat(self._path).st_mtime_ns != before:
                raise self._busy()

    def _busy(self) -> CacheError:
        return CacheError(
            f"{self._path.parent}: another `cap extract-features --ray` is at work there "
            f"({self._holder_in_words()})"
        )

    def _holder(self) -> dict[str, object]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _holder_in_words(self) -> str:
        holder = self._holder()
        return f"process {holder.get('pid', '?')} of {holder.get('host', '?')}"

    def _beat(self) -> None:
        while not self._stopped.wait(self._beat_s):
            with contextlib.suppress(OSError):
                if self._holder().get("token") != self.token:
                    self._lost = True
                    return
                os.utime(self._fd)


def _kernel() -> str:
    """Identifies the running kernel, whose locks are seen by all processes on it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
