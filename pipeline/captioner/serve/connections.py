"""Connections, bounded in number and in the time that they may say nothing.

uvicorn bounds neither. Its `limit_concurrency` answers 503 to everybody, also to those that ask
whether the server is well, as soon as so many connections are open, even if they are all idle.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.captioner.serve.config import Limits

_FULL_BODY = b'{"error": "too many connections; try again in a second"}'
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nretry-after: 1\r\nconnection: close\r\n\r\n%s"
) % (len(_FULL_BODY), _FULL_BODY)
_STOP_GRACE_S = 0.3  # for requests that are on their way when the server is told to stop


class Connections:
    """All connections of a server, the one that has been idle for longest first."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.all: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self.all)

    def touched(self, connection: Connection) -> None:
        """It was active just now."""
        self.all.pop(connection, None)
        self.all[connection] = None

    def room_for_one(self) -> bool:
        """Whether there is room for a connection, if need be in the place of an idle one."""
        if len(self.all) < self.limits.connections:
            return True
        idle = next((each for each in self.all if not each.busy), None)
        if idle is not None:
            self.all.pop(idle)
            idle.close()
        return idle is not None


class Connection(H11Protocol):
    """One connection. uvicorn makes it; `known` belongs to its server."""

    known: Connections

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._late: asyncio.TimerHandle | None = None
        self._stopping = False

    @classmethod
    def of(cls, known: Connections) -> type[Connection]:
        """The class of a server's connections."""
        return type("ConnectionOfServer", (cls,), {"known": known})

    @property
    def busy(self) -> bool:
        """Whether there is a request that has no complete answer yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def close(self) -> None:
        self.transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if not self.known.room_for_one():
            transport.write(_FULL)
            transport.close()
            self.transport = transport
            return
        super().connection_made(transport)
        self.known.touched(self)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        if self not in self.known.all:  # it is closed or closing
            return
        if self.busy:
            self.known.touched(self)
        super().data_received(data)
        if self.busy:
            self._forget_late()
            if self._stopping:
                self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.busy and not self.transport.is_closing():
            self.known.touched(self)
            self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_late()
        if self.flow is None:  # there was no room for it
            return
        self.known.all.pop(self, None)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server stops: answer what is there and what is on its way, and nothing after that."""
        if self.busy:
            super().shutdown()
        else:
            self._stopping = True
            self.loop.call_later(_STOP_GRACE_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if not self.busy and not self.transport.is_closing():
            self.close()

    def _expect_request(self) -> None:
        """From now on, a request's headers have to be complete in time."""
        self._forget_late()
        self._late = self.loop.call_later(self.known.limits.header_s, self._close_if_idle)

    def _forget_late(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
