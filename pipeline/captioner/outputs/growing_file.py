"""A file that grows by a photo at a time, so that a killed command loses nothing and goes on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Collection
from pathlib import Path

from cache.atomic import WriteError, follow_link, still_named, write_atomically
from pipeline.captioner.outputs.forms import Form
from pipeline.captioner.outputs.output import Maker, OutputFileError, counted, foreign
from pipeline.captioner.predictions import Prediction

_SYNC_S = 10.0  # what a loss of power may cost


class GrowingFile:
    """Rows of photos. Nothing is changed before the first row is written.

    A file of an earlier command of the same model and settings is continued: photos that have their
    captions in it are not wanted, those that had an error are tried again. It is locked until
    `close`.
    """

    def __init__(
        self,
        path: Path,
        form: Form,
        maker: Maker,
        photos: Collection[str],
        *,
        several: bool = False,
        overwrite: bool = False,
    ) -> None:
        """photos: all that this command has. several: whether photos have several rows.

        Raises OutputFileError if the file holds something else or another process writes it, and
        WriteError.
        """
        self._path, self._form, self._maker, self._overwrite = path, form, maker, overwrite
        self.captions: dict[str, str] = {}  # the best ones, by key, of earlier commands
        self.written = 0
        self._synced_at = time.monotonic()
        keys = {form.key(photo) for photo in photos}
        self._is_new = not os.path.lexists(path)
        self._fd = self._open()
        try:
            if not overwrite:
                self._continue(keys, several)
            self._is_begun = not overwrite and os.fstat(self._fd).st_size > 0
        except BaseException:
            self.close()
            raise

    def wants(self, path: str) -> bool:
        return self._form.key(path) not in self.captions

    def write(self, prediction: Prediction) -> None:
        self._append(self._form.rows(prediction))
        self.written += not prediction.error

    def finish(self) -> list[str]:
        self._append(b"")
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._failure(error) from None
        count = self.written + len(self.captions)
        return [f"{self._path}: has the captions of {counted(count, 'photo')}"]

    def kept(self) -> str:
        count = self.written + len(self.captions)
        return f"{self._path} has the captions of {counted(count, 'photo')}" if count else ""

    def close(self) -> None:
        if self._is_new:  # and nothing came of it
            with contextlib.suppress(OSError):
                if os.fstat(self._fd).st_size == 0:
                    os.unlink(follow_link(self._path))
        with contextlib.suppress(OSError):
            os.close(self._fd)

    def remove(self) -> None:
        """Remove the file, which is of no more use."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def _open(self) -> int:
        """The file, opened and locked. Raises OutputFileError or WriteError."""
        try:
            target = follow_link(self._path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.path.exists(target) and not os.path.isfile(target):
                raise OSError(errno.EINVAL, "not a regular file")
            for attempt in range(1000):
                fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
                try:
                    with contextlib.suppress(FileNotFoundError):
                        self._lock(fd)
                        if still_named(fd, target, attempt):
                            return fd
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)
            raise OSError(errno.EBUSY, "other processes replace it over and over")
        except OSError as error:
            raise WriteError(f"{self._path}: cannot write ({error.strerror or error})") from None

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputFileError(
                f"{self._path}: another cap process writes it; wait for it, or name another --out"
            ) from None
        except OSError:  # a file system without locks
            pass

    def _continue(self, keys: Collection[str], several: bool) -> None:
        """Read what is there, and cut off what is torn. Raises OutputFileError or WriteError."""
        form, errors = self._form, set[str]()
        end = start = 0  # of the rows that are whole; of those of the last photo
        last = None
        try:
            with open(self._fd, "rb", closefd=False) as file:
                file.seek(0)
                for number, record in enumerate(form.split(file), 1):
                    is_torn = not record.endswith(b"\n")
                    if number == 1 and form.header:
                        if record != form.header:
                            if is_torn and form.header.startswith(record):
                                break
                            raise foreign(self._path, None)
                        start = end = len(record)
                        continue
                    if is_torn:
                        if number == 1 and not form.may_begin(record):
                            raise foreign(self._path, None)
                        break
                    try:
                        row = form.read(record)
                    except (ValueError, TypeError):
                        raise self._unreadable(number) from None
                    if not self._maker.made(row.mark):
                        raise foreign(self._path, row.mark)
                    if row.path != last:
                        start, last = end, row.path
                    end += len(record)
                    if row.is_error:
                        errors.add(row.path)
                    else:
                        self.captions.setdefault(row.path, row.caption)
        except OSError as error:
            raise WriteError(f"{self._path}: cannot read ({error.strerror or error})") from None
        if several and last is not None:  # some of its rows may be missing
            self.captions.pop(last, None)
            end = start
        try:
            os.ftruncate(self._fd, end)
        except OSError as error:
            raise self._failure(error) from None
        if errors & set(keys):
            self._forget(errors & set(keys))

    def _unreadable(self, number: int) -> OutputFileError:
        if number == 1:
            return foreign(self._path, None)
        return OutputFileError(
            f"{self._path}: row {number:,} is none that cap wrote; name another --out, or replace "
            "the file with --overwrite"
        )

    def _forget(self, again: Collection[str]) -> None:
        """Take out the errors of photos that are tried again."""

        def write(temporary: Path) -> None:
            with open(self._fd, "rb", closefd=False) as file, temporary.open("wb") as new:
                file.seek(0)
                for number, record in enumerate(self._form.split(file), 1):
                    if number > 1 or not self._form.header:
                        row = self._form.read(record)
                        if row.is_error and row.path in again:
                            continue
                    new.write(record)

        write_atomically(self._path, write)
        os.close(self._fd)
        self._fd = self._open()

    def _append(self, rows: bytes) -> None:
        if not self._is_begun:
            try:
                os.ftruncate(self._fd, 0)
            except OSError as error:
                raise self._failure(error) from None
            self._is_begun, rows = True, self._form.header + rows
        try:
            whole = os.fstat(self._fd).st_size
            try:
                left = memoryview(rows)
                while left:
                    left = left[os.write(self._fd, left) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, whole)
                raise
            if time.monotonic() - self._synced_at > _SYNC_S:
                os.fsync(self._fd)
                self._synced_at = time.monotonic()
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> WriteError:
        reason = f"{self._path}: cannot write ({error.strerror or error})"
        kept = self.kept()
        return WriteError(f"{reason}; {kept}; the same command goes on" if kept else reason)
