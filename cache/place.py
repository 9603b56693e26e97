"""The place of a cache: who may write there, and how a new file gets its name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cache.atomic import draft, remove_leftovers, still_named
from cache.record import CacheError
from cache.seal import is_cache


def lock_existing(path: Path) -> int | None:
    """A locked descriptor of the cache at `path`; None if there is no file.

    Raises CacheError if there cannot be a cache, if there is a file that is none, or if another
    process is writing it.
    """
    # Functions of `os.path`, which raise no error where a folder above may not be read.
    folder = folder_above(path)
    if not os.path.isdir(folder):
        raise CacheError(f"{folder}: is no folder, so nothing can be written below it")
    if os.path.isdir(path):
        raise CacheError(f"{path}: is a folder; name a file")
    if os.path.exists(path) and not os.path.isfile(path):
        raise CacheError(f"{path}: not a regular file; name another --out")
    fd = _lock(path)
    if fd is not None and not is_cache(path):
        os.close(fd)
        raise CacheError(f"{path}: not a feature cache, so it is not replaced; name another --out")
    return fd


def folder_above(path: Path) -> Path:
    """The folder of `path`, or the nearest one above it that is there: `new_file` makes the rest.

    It may be no folder, but another file.
    """
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def lock_new(fd: int, path: Path) -> None:
    """Lock the file just made at `path`. Raises CacheError."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CacheError(f"{path}: cannot lock ({error.strerror})") from None


def _lock(path: Path) -> int | None:
    """An exclusively locked descriptor of `path`; None if there is no file."""
    attempt = 0
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CacheError(f"{path}: cannot write ({error.strerror})") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if still_named(fd, path, attempt):
                return fd
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(fd)
            raise CacheError(f"{path}: another process is writing it") from None
        except OSError as error:
            os.close(fd)
            raise CacheError(f"{path}: cannot lock ({error.strerror})") from None
        os.close(fd)
        attempt += 1


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """The path of a draft of `path`; see `draft`. Error messages name `path` instead of it.

    Folders that are missing are made. Raises CacheError if another process is making the same file,
    or if the disk fails.
    """
    if remove_leftovers(path):
        raise CacheError(f"{path}: another process is writing it")
    temporary = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft(path) as temporary:
            yield temporary
    except CacheError as error:
        raise CacheError(str(error).replace(f"{temporary}: ", f"{path}: ", 1)) from None
    except OSError as error:
        raise CacheError(f"{path}: cannot write ({error.strerror or error})") from None


def publish(temporary: Path, fd: int, path: Path, *, replace: bool) -> bool:
    """Sync a finished draft, whose descriptor is `fd`, and give it the name `path`.

    replace: whether a file may be there, which the caller has locked. Otherwise False is returned
    if there is one: another process has made it meanwhile. Raises OSError.
    """
    os.fsync(fd)
    if replace:
        temporary.rename(path)
    else:
        try:
            os.link(temporary, path)  # unlike a rename, it never replaces a file
        except FileExistsError:
            return False
        except OSError:  # a file system without links, such as FAT
            if path.exists():
                return False
            temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network drives cannot sync a folder
            raise
    finally:
        os.close(folder)
    return True
