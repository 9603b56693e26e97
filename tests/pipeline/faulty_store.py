"""A store like S3 on this machine (moto's), which is slow, fails now and then, and hangs up."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

BUCKET = "photos"


@dataclass
class Faults:
    """What goes wrong with requests for objects; those that list or write are left alone."""

    slow_s: float = 0.0
    # What happens to the n-th request of an object, from 0 on: `500`, `503`, `cut off`, `fine`.
    fate: Callable[[str, int], str] = lambda path, number: "fine"
    requests: Counter[str] = field(default_factory=Counter)  # by object
    most_at_once: int = 0
    served_bytes: int = 0
    _at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, path: str) -> str:
        with self._lock:
            number = self.requests[path]
            self.requests[path] += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self.slow_s)
        return self.fate(path, number)

    def end(self) -> None:
        with self._lock:
            self._at_once -= 1


class FaultyStore:
    """An application for a server of moto's kind. `faults` may be replaced at any time."""

    def __init__(self) -> None:
        moto = pytest.importorskip("moto.server")
        self.faults = Faults()
        self._store = moto.DomainDispatcherApplication(moto.create_backend_app)

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        is_object = environ["REQUEST_METHOD"] == "GET" and path.count("/") > 1 and path[-1] != "/"
        if not is_object:
            yield from self._store(environ, start_response)
            return
        faults = self.faults
        fate = faults.begin(path)
        try:
            if fate.isdigit():
                start_response(f"{fate} Slow Down", [("Content-Length", "0")])
                return
            body = b"".join(self._store(environ, start_response))
            faults.served_bytes += len(body)
            if fate == "cut off":
                yield body[: len(body) // 2]
                raise ConnectionResetError("cut off on purpose")
            yield body
        finally:
            faults.end()


def served() -> Iterator[tuple[str, FaultyStore]]:
    """(address, store) of a server on this machine, until the generator is closed."""
    serving = pytest.importorskip("werkzeug.serving")

    class Quiet(serving.WSGIRequestHandler):  # type: ignore[misc, name-defined]
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            """Say nothing, also of what is cut off on purpose."""

    store = FaultyStore()
    server = serving.make_server("127.0.0.1", 0, store, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
