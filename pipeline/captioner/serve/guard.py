"""What holds for every request and every answer: whom the server answers, and what browsers may do
with its answers.

A page of another site can make a browser send requests to a server on the user's own machine. If
that site lets its name lead to this machine, the browser even lets it read the answers. Both tell
themselves by the headers `Host` and `Origin`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.captioner.serve.metrics import Metrics
from pipeline.captioner.serve.refusal import Refusal, RefusalResponse

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:/@\[\]]+)(:\d+)?")  # a name or an address, and a port
_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        b"connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


class Guard:
    """An ASGI application around another one."""

    def __init__(
        self, app: ASGIApp, *, names: Iterable[str], metrics: Metrics, linger_s: float
    ) -> None:
        self._app, self._metrics, self._linger_s = app, metrics, linger_s
        self._names = {"localhost", *(name.lower().rstrip(".") for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send_guarded)
            return
        self._metrics.refused(refusal.reason)
        await RefusalResponse(refusal, linger_s=self._linger_s)(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Refusal | None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        host = hosts[0].decode("latin-1") if len(hosts) == 1 else ""
        if not self._is_ours(host):
            return Refusal(
                "host", "this server does not go by that name; start it with --allow-host NAME"
            )
        for name, value in scope["headers"]:
            if name != b"origin":
                continue
            # Behind a proxy the scheme may be another one; name and port are the page's own.
            if urlsplit(value.decode("latin-1")).netloc.lower() != host.lower():
                return Refusal("origin", "pages of other sites may not ask this server")
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header names this server.

        An address is never another site's name, so every address will do.
        """
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1]
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower().rstrip(".") in self._names
        return True
