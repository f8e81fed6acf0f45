"""The side that faces browsers: a page, its states as server-sent events, and one button."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import re
import socket
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config
from uvicorn.server import ServerState

from pyvmm.dashboard.connection import HEAD_MAX, BoundedConnection
from pyvmm.dashboard.feed import TIMEOUT, Feed
from pyvmm.dashboard.guard import Guard
from pyvmm.dashboard.hub import Hub
from pyvmm.dashboard.state import FAILOVER
from pyvmm.errors import DeadlineError, PyvmmError

LAST_WORDS = 0.3
"""Seconds for browsers to hear that the machine has ended."""
BACKLOG = 64


async def serve(link: socket.socket, listener: socket.socket, token: str, name: str | None) -> None:
    """Answer at ``listener`` what is asked about the machine at the other end of ``link``, until that hangs up."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    last: dict[str, Any] = {}

    def publish(state: dict[str, Any]) -> None:
        last.update(state)
        loop.call_soon_threadsafe(hub.publish, json.dumps(state).encode())

    def ended() -> None:
        publish({**last, "status": "ended"})
        loop.call_soon_threadsafe(over.set)

    feed = Feed(link, publish, ended)
    hub = Hub(feed.watch)
    server = await listen(Guard(_application(hub, feed), token, name), listener)
    feed.start()
    await over.wait()
    server.close()
    hub.end()
    if hub.clients:
        await asyncio.sleep(LAST_WORDS)
    logging.disable()  # of those that have not taken it by now


async def listen(application: ASGIApp, listener: socket.socket) -> asyncio.Server:
    """Answer at ``listener``, within limits."""
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # what browsers do wrong is nobody's news here
    config = Config(
        application, http=BoundedConnection, ws="none", lifespan="off", loop="none", log_config=None, access_log=False,
        server_header=False, date_header=False, proxy_headers=False, h11_max_incomplete_event_size=HEAD_MAX,
    )  # fmt: skip
    config.load()
    loop, state = asyncio.get_running_loop(), ServerState()
    return await loop.create_server(lambda: BoundedConnection(config, state, {}, loop), sock=listener, backlog=BACKLOG)


def _application(hub: Hub, feed: Feed) -> Starlette:
    page, policy = load_page()

    def index(_request: Request) -> Response:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    async def failover(_request: Request) -> Response:
        """Ask for it; the page sees what comes of it. As ``pyvmm colo failover``."""
        try:
            async with asyncio.timeout(2 * TIMEOUT):
                await asyncio.wrap_future(feed.order(FAILOVER))
        except (DeadlineError, TimeoutError) as error:
            return PlainTextResponse(f"{error or 'no answer from the machine'}\n", 504)
        except PyvmmError as error:
            return PlainTextResponse(f"{error}\n", 409)
        return JSONResponse({"asked": True})

    return Starlette(routes=[
        Route("/", index, methods=["GET"]),
        Route("/events", States(hub, events=True), methods=["GET"]),
        Route("/state", States(hub, events=False), methods=["GET"]),
        Route("/failover", failover, methods=["POST"]),
    ])  # fmt: skip


class States:
    """ASGI: the machine's state, once or as it changes."""

    def __init__(self, hub: Hub, *, events: bool) -> None:
        self._hub = hub
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._hub.join():
            full = PlainTextResponse("enough browsers look at this machine\n", 503, {"retry-after": "5"})
            await full(scope, receive, send)
            return
        try:
            if self._events:
                response: Response = StreamingResponse(self._stream(), media_type="text/event-stream")
            else:
                response = Response(await anext(self._hub.states(), b"{}"), media_type="application/json")
            await response(scope, receive, send)
        finally:
            self._hub.leave()

    async def _stream(self) -> AsyncIterator[bytes]:
        yield b"retry: 2000\n\n"
        async for state in self._hub.states():
            yield b"data: " + state + b"\n\n"


def load_page() -> tuple[str, str]:
    """The page with all it needs in it, and the policy that lets nothing else run or load there."""
    folder = files("pyvmm.dashboard") / "page"
    text = (folder / "page.html").read_text(encoding="utf-8")
    for mark, tag in (("page.css", "style"), ("page.js", "script")):
        inside = (folder / mark).read_text(encoding="utf-8")
        text = text.replace(f"<!-- {mark} -->", f"<{tag}>\n{inside}</{tag}>")

    def hashes(tag: str) -> str:
        found = [hashlib.sha256(each.encode()) for each in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)]
        return " ".join(f"'sha256-{base64.b64encode(each.digest()).decode()}'" for each in found)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy
