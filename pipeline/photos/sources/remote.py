"""Remote stores by fsspec: sizes, listings and bytes, with patience for faults that pass.

Credentials, regions and endpoints are what fsspec takes from the environment and its configuration.
"""

from __future__ import annotations

import errno
import functools
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.photos.sources.errors import GO_ON, SourceError
from pipeline.photos.sources.places import without_secrets

T = TypeVar("T")

# A fault that has not passed after so long is taken to last. Less than the time after which a
# silent disk counts as gone (`drive/silence.py`), so that the reason is told and not the silence.
PATIENCE_S = 40.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 5.0
_CONNECT_S, _READ_S = 10, 15

# Answers of a server (HTTP) that another attempt may change, besides those from 500 on.
_TRY_AGAIN = frozenset((408, 425, 429))
# Errors of libraries that no other attempt changes; by name, to import none of them.
_LASTING_NAMES = frozenset(
    (
        *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"),
        *("ProfileNotFound", "ParamValidationError", "InvalidURL", "NonHttpUrlClientError"),
        *("UnknownServiceError", "InvalidRegionError", "TooManyRedirects"),
    )
)
_LASTING = (PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)
_EXTRAS = {"s3": "'cap[remote]'", "http": "'cap[remote]'", "https": "'cap[remote]'", "gs": "gcsfs"}
_LONGEST_REASON = 200


class _ShortRead(OSError):
    """Fewer bytes came than were asked for."""


class _NoRanges(Exception):
    """The server sends whole files only."""


def size_of(address: str) -> int:
    """The size of an object in bytes. Raises FileNotFoundError or SourceError."""

    def ask() -> int:
        fs, path = filesystem(address)
        size = fs.info(path).get("size")
        if size is None:
            raise NotImplementedError("the server does not tell its size")
        if is_http(address) and size:
            _check_ranges(fs, path)
        return int(size)

    return patiently(address, ask)


def fetch(address: str, start: int | None = None, size: int = -1) -> bytes:
    """Bytes of an object: `size` of them from `start` on, or all.

    size: may be unknown (-1) for a whole object. Raises FileNotFoundError if there is no such
    object, and SourceError for a fault that lasts.
    """
    if size == 0:
        return b""

    def ask() -> bytes:
        fs, path = filesystem(address)
        if start is None:
            data: bytes = fs.cat_file(path)
        else:
            data = fs.cat_file(path, start=start, end=start + size)
        if size >= 0 and len(data) < size:
            raise _ShortRead(f"{len(data):,} bytes came instead of {size:,}")
        if start is not None and len(data) > size:
            raise _NoRanges
        return data

    return patiently(address, ask)


def listed(address: str) -> dict[str, int]:
    """The objects below an address: name below it → size in bytes, -1 if unknown; sorted.

    Raises SourceError or FileNotFoundError.
    """

    def ask() -> dict[str, int]:
        fs, path = filesystem(address)
        base = path.rstrip("/") + "/"
        found = {}
        for name, info in fs.find(path, detail=True).items():
            # Some stores leave out the slash at the beginning, and some keep a marker of a folder.
            below = name.removeprefix(base) if name.startswith(base) else None
            if below and not below.endswith("/"):
                size = info.get("size")
                found[below] = -1 if size is None else int(size)
        if not found and not fs.exists(path):
            raise FileNotFoundError(errno.ENOENT, "no such object")
        return dict(sorted(found.items()))

    return patiently(address, ask)


def matches(pattern: str) -> list[str]:
    """The addresses of the objects that a pattern with `*` stands for, sorted."""

    def ask() -> list[str]:
        fs, path = filesystem(pattern)
        return [str(fs.unstrip_protocol(name)) for name in sorted(fs.glob(path))]

    return patiently(pattern, ask)


def exists(address: str) -> bool:
    """Raises SourceError if the store does not tell."""

    def ask() -> bool:
        fs, path = filesystem(address)
        fs.info(path)
        return True

    try:
        return patiently(address, ask)
    except FileNotFoundError:
        return False


def is_http(address: str) -> bool:
    return address.lower().startswith(("http://", "https://"))


def filesystem(address: str) -> tuple[Any, str]:
    """(fsspec's file system of an address, the path in it). Raises SourceError."""
    scheme = address.partition("://")[0].lower()
    fs = _filesystem(scheme, _host(address))
    return fs, fs._strip_protocol(address)


def _host(address: str) -> str:
    """The beginning of an address that says which file system it is: its user and host for some."""
    scheme, _, rest = address.partition("://")
    if scheme.lower() in ("s3", "s3a", "gs", "gcs", "http", "https", "memory"):
        return f"{scheme}://"
    return f"{scheme}://{rest.partition('/')[0]}/"


@functools.lru_cache(maxsize=16)
def _filesystem(scheme: str, host: str) -> Any:
    extra = _EXTRAS.get(scheme, "the package that it names")
    try:
        import fsspec
        from fsspec.config import conf
    except ImportError:
        raise SourceError(
            f"{scheme}://: remote addresses need fsspec; `pip install 'cap[remote]'` brings it"
        ) from None
    options: dict[str, Any] = {}
    if scheme in ("s3", "s3a"):
        told = conf.get("s3", {}).get("config_kwargs", {})
        # One attempt: `patiently` tries again. Three layers of attempts would take minutes.
        options = {"config_kwargs": {"retries": {"total_max_attempts": 1}, **told}}
    elif scheme in ("http", "https") and "client_kwargs" not in conf.get(scheme, {}):
        options = {"client_kwargs": {"timeout": _http_timeout()}}
    try:
        fs, _ = fsspec.core.url_to_fs(host, **options)
    except ImportError as error:
        raise SourceError(
            f"{scheme}://: such addresses need a package that is missing; `pip install {extra}` "
            f"({_reason(error)})"
        ) from None
    except ValueError as error:
        raise SourceError(
            f"{scheme}://: fsspec knows no such addresses ({_reason(error)})"
        ) from None
    if scheme in ("s3", "s3a"):
        fs.retries = 1
    return fs


def _http_timeout() -> Any:
    try:
        import aiohttp
    except ImportError:
        raise SourceError(
            "http://: such addresses need aiohttp; `pip install 'cap[remote]'` brings it"
        ) from None
    return aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_READ_S)


def _check_ranges(fs: Any, path: str) -> None:
    """Raise _NoRanges if a server sends the whole file where a part is asked for.

    Without this, the first part of a tar would be all of it.
    """
    from fsspec.asyn import sync

    async def answer() -> int:
        session = await fs.set_session()
        settings = dict(fs.kwargs)
        headers = {**settings.pop("headers", {}), "Range": "bytes=0-0"}
        async with session.get(fs.encode_url(path), headers=headers, **settings) as response:
            return int(response.status)

    if sync(fs.loop, answer) == 200:
        raise _NoRanges


def patiently(address: str, ask: Callable[[], T]) -> T:
    """What `ask` returns. Faults that may pass are met with another attempt, after a while.

    Raises FileNotFoundError, or SourceError with the reason.
    """
    begun, attempts, wait_s = time.monotonic(), 0, _FIRST_WAIT_S
    name = without_secrets(address)
    while True:
        attempts += 1
        try:
            return ask()
        except SourceError:
            raise
        except _NoRanges:
            raise SourceError(
                f"{name}: the server sends whole files only, and no parts of them; copy the file "
                "to a drive"
            ) from None
        except Exception as caught:
            error = _behind(caught) if is_http(address) else caught
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, "no such object", name) from None
            if _is_lasting(error):
                raise SourceError(f"{name}: cannot read ({_reason(error)})") from None
            spent_s = time.monotonic() - begun
            if spent_s + wait_s > PATIENCE_S:
                raise SourceError(
                    f"{name}: cannot read ({_reason(error)}), after {attempts} attempts in "
                    f"{spent_s:.0f} s; {GO_ON}"
                ) from None
        time.sleep(wait_s * random.uniform(0.5, 1.0))  # not all readers at once
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def _behind(error: Exception) -> Exception:
    """What has happened over HTTP. fsspec calls any failure to learn a size a missing file."""
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        return FileNotFoundError() if getattr(cause, "status", None) in (404, 410) else cause
    return error


def _is_lasting(error: Exception) -> bool:
    status = getattr(error, "status", None)  # of an answer by HTTP
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _TRY_AGAIN
    if isinstance(error, _LASTING) or type(error).__name__ in _LASTING_NAMES:
        return True
    # A defect of this program or of a library; but libraries raise ValueErrors for broken answers.
    return isinstance(error, (TypeError, AttributeError, ImportError))


def _reason(error: BaseException) -> str:
    """An error in one line without secrets."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"the server answers {status} {getattr(error, 'message', '')}".strip()
    text = without_secrets(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "…"
