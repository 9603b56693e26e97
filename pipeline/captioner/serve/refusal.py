"""Requests that get no caption, and why."""

from __future__ import annotations

import asyncio
import json

from starlette.types import Receive, Scope, Send

# Status of the answer to each reason that the metrics count.
STATUS = {
    "malformed": 400,
    "origin": 403,
    "slow": 408,
    "too_large": 413,
    "not_a_photo": 422,
    "media_type": 415,
    "host": 421,
    "failed": 500,
    "busy": 503,
}
_RETRY_AFTER_S = 1


class Refusal(Exception):
    """Raised for a request that gets no caption. The message is for its client, on one line."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ClientLeft(Exception):
    """Raised when the client has closed the connection, so that nobody waits for an answer."""


class RefusalResponse:
    """The answer to a refused request, as an ASGI application.

    If a part of the body is still on its way, it is read and thrown away after the answer, for a
    short time. Otherwise the system would reset the connection, and many clients, busy sending,
    would never see the answer.
    """

    def __init__(self, refusal: Refusal, *, linger_s: float = 0.0) -> None:
        self._refusal, self._linger_s = refusal, linger_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = STATUS[self._refusal.reason]
        body = json.dumps({"error": str(self._refusal)}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
        ]
        if status == 503:
            headers.append((b"retry-after", b"%d" % _RETRY_AFTER_S))
        if self._linger_s:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if self._linger_s:
            await send({"type": "http.response.body", "body": body, "more_body": True})
            # A client that waits for leave to send (curl, with a large file) has read by now that
            # it gets none; `receive` would give leave.
            if not any(name == b"expect" for name, _ in scope["headers"]):
                await _read_on(receive, self._linger_s)
            body = b""
        await send({"type": "http.response.body", "body": body})


async def _read_on(receive: Receive, seconds: float) -> None:
    """Read the rest of a request and forget it, for some seconds at most."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        pass
