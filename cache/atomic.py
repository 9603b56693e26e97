"""Writing files so that they are either complete or not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cache.errors import CapError

_ATTEMPTS = 10
_MARK = ".cap-"
_LOCK_TEXT = b"Here cap writes a file. If no cap process runs any more, delete this folder.\n"
_NAME_BYTES = 200  # of a file's name, so that the folder's own does not exceed the usual 255


class WriteError(CapError):
    """Raised when a file cannot be written: a full disk, or a folder that is missing or read-only.

    The message is one line that begins with the file.
    """


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with the path of a temporary file, sync that file, and rename it to `path`.

    If `path` is a symbolic link, the file that it points to is written. Several writers do not
    disturb one another: the last one to finish wins. The file gets the mode of any new file (0o666
    less the umask), whatever mode `write` gives it. Raises WriteError if `write` or the system
    raises OSError, or if `path` is no regular file, such as /dev/null; `path` is then unchanged.
    """
    target = follow_link(path)
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            raise OSError(errno.EINVAL, "not a regular file")
        remove_leftovers(target)
        with draft(target) as temporary:
            # Asking for the umask would mean setting it, for all threads. A new file shows it.
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            write(temporary)
            if stat.S_IMODE(temporary.stat().st_mode) != mode:  # safetensors' files have mode 600
                temporary.chmod(mode)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(target)
    except OSError as error:
        raise WriteError(f"{path}: cannot write ({error.strerror or error})") from None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically. Raises WriteError."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def follow_link(path: Path) -> Path:
    """`path`, or the file that it points to if it is a symbolic link, whether that exists or not.

    Renaming a new file to a link would replace the link, and its file may be on another disk.
    """
    return Path(os.path.realpath(path)) if os.path.islink(path) else path


def still_named(fd: int, path: Path, attempt: int) -> bool:
    """Whether an open file, just locked, is still the one at `path`.

    If not, it was renamed or removed between opening and locking, and opening it again helps. But
    some file systems give the same file another inode number at each look. So after some attempts
    it is enough that the file has a name, which a replaced file has no more. attempt: from 0 on.
    Raises FileNotFoundError if there is no file at `path`, and OSError.
    """
    opened, there = os.fstat(fd), os.stat(path)
    if os.path.samestat(opened, there):
        return True
    return attempt >= _ATTEMPTS and (opened.st_nlink > 0 or attempt >= 10 * _ATTEMPTS)


@contextlib.contextmanager
def draft(path: Path) -> Iterator[Path]:
    """The path of a file to be written and then renamed to `path`; it does not exist yet.

    It is in a new folder of its own beside `path`, which no other writer uses and no user has made.
    The folder is removed after the block. A locked file in it says that its writer lives. Raises
    OSError.
    """
    folder, lock = _new_folder(path)
    try:
        yield folder / "file"
    finally:
        _remove(folder)
        os.close(lock)


def remove_leftovers(path: Path) -> bool:
    """Remove the drafts of `path` whose writers were killed. Whether another writer is at work.

    A folder is removed only if `draft` made it (it has the name and the lock file of one) and its
    lock shows that its writer is dead. Errors leave it where it is.
    """
    busy = False
    prefix = _prefix(path)
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in [entry for entry in entries if entry.name.startswith(prefix)]:
            busy |= _is_alive(path.with_name(entry.name))
    return busy


def _prefix(path: Path) -> str:
    return "." + os.fsdecode(os.fsencode(path.name)[:_NAME_BYTES]) + _MARK


def _new_folder(path: Path) -> tuple[Path, int]:
    """(a new folder beside `path`, the descriptor of the locked file in it)."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        try:
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        except FileNotFoundError:  # another writer has taken it for a leftover
            continue
        with contextlib.suppress(OSError):  # without locks, leftovers stay until the user comes
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            os.write(lock, _LOCK_TEXT)
        except OSError:
            _remove(folder)
            os.close(lock)
            raise
        if (folder / "lock").exists():
            return folder, lock
        os.close(lock)  # taken for a leftover before it was locked


def _remove(folder: Path) -> None:
    """Remove a draft's folder, which has files only; quietly, because the draft itself is safe.

    `shutil.rmtree` would refuse where inode numbers change from one look to the next.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _is_alive(folder: Path) -> bool:
    """Remove a draft's folder if its writer is dead. Whether it lives."""
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        with contextlib.suppress(OSError):
            folder.rmdir()  # killed before it had a lock; this removes nothing but an empty folder
        return False
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.pread(lock, len(_LOCK_TEXT) + 1, 0) in (_LOCK_TEXT, b""):
            _remove(folder)
    except BlockingIOError:
        return True
    except OSError:
        pass
    finally:
        os.close(lock)
    return False
