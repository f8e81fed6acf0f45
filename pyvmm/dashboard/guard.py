"""Which requests are answered at all, before anything else looks at them.

* ``Host`` has to be an address, ``localhost`` or the name that the user gave: a page of somebody else's whose name
  was rebound to this address says that name (DNS rebinding).
* ``Origin``, if a browser sends it, has to be this dashboard: no other page may read or do anything here.
* What changes something is a POST without a body, with the token in a header: never in an address, which ends up in
  histories and logs. A form cannot send that header, and a script elsewhere would have to ask first (CORS), in vain.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyvmm.dashboard.token import same_token

TOKEN_HEADER = "x-pyvmm-token"
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)
"""On every answer."""


class Guard:
    """ASGI middleware. ``name``: how the dashboard may be called besides ``localhost`` and any address."""

    def __init__(self, app: ASGIApp, token: str, name: str | None) -> None:
        self._app = app
        self._token = token
        self._names = {"localhost", *([name.lower()] if name else [])}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        refused = self._refusal(scope)
        await (refused or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> PlainTextResponse | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        hosts = _values(headers, b"host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return PlainTextResponse("this dashboard does not go by that name (Host)\n", 403)
        origins = _values(headers, b"origin")
        if any(origin.lower() not in (b"http://" + hosts[0].lower(), b"https://" + hosts[0].lower())
               for origin in origins):  # fmt: skip
            return PlainTextResponse("not for other pages (Origin)\n", 403)
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return PlainTextResponse("GET or POST\n", 405, {"allow": "GET, HEAD, POST"})
        lengths = _values(headers, b"content-length")
        if _values(headers, b"transfer-encoding") or any(length != b"0" for length in lengths):
            return PlainTextResponse("nothing here takes a body\n", 413, {"connection": "close"})
        if scope["method"] == "POST":
            given = _values(headers, TOKEN_HEADER.encode())
            if len(given) != 1 or not same_token(given[0], self._token):
                return PlainTextResponse(f"{TOKEN_HEADER}: not the token of this dashboard\n", 403)
        return None

    def _is_ours(self, host: bytes) -> bool:
        text = host.decode("latin-1").lower()
        bracket = text.find("]")
        name = text[1:bracket] if text.startswith("[") and bracket > 0 else text.partition(":")[0]
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _values(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]
