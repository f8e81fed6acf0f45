"""Browsers that are slow, silent or too many, at a server that has more to tell than a machine ever would."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from pyvmm.dashboard import connection
from pyvmm.dashboard.hub import Hub
from pyvmm.dashboard.server import States, listen

PIECE = 20_000
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def serving(hub: Hub) -> AsyncIterator[int]:
    """The port of a server whose states are numbers, filled up."""
    with socket.socket() as listener:
        listener.setblocking(False)
        listener.bind(("127.0.0.1", 0))
        server = await listen(Starlette(routes=[Route("/events", States(hub, events=True))]), listener)
        port = int(listener.getsockname()[1])

        async def publish() -> None:
            number = 0
            while True:
                hub.publish(b"%d " % number + b"x" * PIECE)
                number += 1
                await asyncio.sleep(0.005)

        publishing = asyncio.create_task(publish())
        try:
            yield port
        finally:
            publishing.cancel()
            server.close()


async def ask(port: int) -> Streams:
    """A client of the stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
    writer.write(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return reader, writer


async def numbers(reader: asyncio.StreamReader, seconds: float) -> list[int]:
    """What arrives in that time; a chunked answer's lines."""
    found: list[int] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while line := await reader.readline():
                if line.startswith(b"data: "):
                    found.append(int(line.split()[1]))
    return found


def test_a_slow_client_is_dropped_and_the_others_see_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SLOW_DEADLINE", 0.3)
    watched: list[bool] = []

    async def run() -> None:
        hub = Hub(watched.append)
        async with serving(hub) as port:
            slow = socket.socket()
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.setblocking(False)
            await asyncio.get_running_loop().sock_connect(slow, ("127.0.0.1", port))
            slow.send(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            reader, writer = await ask(port)
            seen = await numbers(reader, 1.0)
            assert len(seen) > 20
            assert seen == sorted(set(seen))
            assert seen[-1] > 25
            got = b""
            with pytest.raises(ConnectionResetError):  # not an end in order: what waited was thrown away
                while piece := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(slow, 1 << 16), 5):
                    got += piece
                raise AssertionError("it was closed in order")
            assert len(got) < 10 * PIECE
            slow.close()
            assert watched == [True]
            writer.close()
            await asyncio.sleep(0.1)
            assert watched == [True, False]

    asyncio.run(run())


def test_a_client_that_pauses_misses_states_and_goes_on() -> None:
    async def run() -> None:
        hub = Hub(lambda _watched: None)
        async with serving(hub) as port:
            reader, writer = await ask(port)
            early = await numbers(reader, 0.1)
            await asyncio.sleep(0.6)
            late = await numbers(reader, 0.5)
            gaps = [b - a for a, b in zip([*early, *late], late, strict=False)]
            assert max(gaps) > 20, "what was not taken was kept"
            writer.close()

    asyncio.run(run())


def test_who_says_nothing_or_not_all_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REQUEST_DEADLINE", 0.3)

    async def run() -> None:
        async with serving(Hub(lambda _watched: None)) as port:
            post = b"POST /events HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx"

            async def told(said: bytes) -> None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(said)
                with contextlib.suppress(ConnectionResetError):
                    await asyncio.wait_for(reader.read(), 3)
                writer.close()

            await asyncio.gather(*(told(said) for said in (b"", b"GET /events HTTP/1.1\r\nHo", post)))
            reader, writer = await ask(port)  # but an answer may take as long as it likes
            assert len(await numbers(reader, 0.6)) > 20
            writer.close()

    asyncio.run(run())


def test_more_connections_than_anybody_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECTIONS_MAX", 4)

    async def run() -> None:
        async with serving(Hub(lambda _watched: None)) as port:
            idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
            await asyncio.sleep(0.05)
            reader, writer = await ask(port)
            with pytest.raises(ConnectionResetError):
                if not await asyncio.wait_for(reader.read(), 3):
                    raise ConnectionResetError
            for _, other in [*idle, (reader, writer)]:
                other.close()

    asyncio.run(run())
