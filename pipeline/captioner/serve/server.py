"""The server from start to stop.

It is one process. The networks use all cores for each batch, so a second process would only share
them, with a second copy of the weights; and a process that is forked after a model was loaded has
lost the threads that compute.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from pipeline.captioner.captioner import Captioner
from pipeline.captioner.serve.app import Served
from pipeline.captioner.serve.config import Limits, ServeConfig, ServeError
from pipeline.captioner.serve.connections import Connection, Connections

_BACKLOG = 256
_KEEP_ALIVE_S = 15
_HEADER_BYTES = 16_384


def bind(config: ServeConfig) -> socket.socket:
    """A socket at the address, which does not listen yet. Raises ServeError."""
    try:
        found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no valid name"
        raise ServeError(f"{config.host}: cannot listen there ({reason})") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_listen(config, error) from None
    return bound


def _cannot_listen(config: ServeConfig, error: OSError) -> ServeError:
    remedy = "; use another --port, or --port 0 for a free one" if config.port else ""
    return ServeError(f"{config.host} port {config.port}: {os.strerror(error.errno or 0)}{remedy}")


def address_of(bound: socket.socket) -> str:
    """`http://127.0.0.1:8000`."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    captioner: Captioner,
    config: ServeConfig,
    bound: socket.socket,
    *,
    model: Path,
    started: Callable[[str], None],
    limits: Limits | None = None,
) -> int:
    """Serve until SIGTERM or Ctrl-C, then answer what is in flight.

    A second Ctrl-C ends at once. bound: of `bind`; it is closed at the end. started: is told the
    address once requests are answered. Returns how many photos were captioned. Raises ServeError.
    """
    limits = limits or Limits()
    known = Connections(limits)
    served = Served(
        captioner, config, name=model.name, limits=limits, connections=lambda: len(known)
    )
    served.batcher.warm_up()
    gc.collect()
    gc.freeze()  # what the model is made of is walked through no more
    server = _Server(
        uvicorn.Config(
            served.app,
            http=Connection.of(known),
            ws="none",
            lifespan="on",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing is decided by the client's address
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=limits.stop_s,
            h11_max_incomplete_event_size=_HEADER_BYTES,
        ),
        lambda: started(address_of(bound)),
    )
    with _quiet_log(), _signals_end_well(), bound:
        try:
            bound.listen(_BACKLOG)
        except OSError as error:
            raise _cannot_listen(config, error) from None
        server.run(sockets=[bound])
    return served.metrics.photos


class _Server(uvicorn.Server):
    """uvicorn's, which tells when it listens."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell()


@contextlib.contextmanager
def _signals_end_well() -> Iterator[None]:
    """uvicorn stops at SIGINT and SIGTERM, and then sends itself the signal again: do nothing."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.signal(each, lambda *_: None) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Only errors of ours are worth a word; what clients do wrong is in the metrics."""
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "python_multipart")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
