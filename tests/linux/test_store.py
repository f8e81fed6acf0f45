"""guests/linux/store.c: the very program on loopback, and under sanitizers against requests that are none."""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.framework.processes import REPOSITORY
from tests.unit.linux.scripts import load_script

SOURCE = REPOSITORY / "guests" / "linux" / "store.c"
SANITIZED = ["gcc", "-DHOSTED", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined",
             "-fno-sanitize-recover=all", str(SOURCE), "-o"]  # fmt: skip


@contextlib.contextmanager
def running(program: Path, *words: str) -> Iterator[int]:
    """Its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([program, "--port", str(port), *words], stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        assert process.stderr.readline() == b"store: ready\n"
        yield port
        assert process.poll() is None, process.stderr.read()
    finally:
        process.kill()
        process.wait(10)
        process.stderr.close()


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the guest has it."""
    program = tmp_path_factory.mktemp("bare") / "store"
    program.write_bytes(load_script("guests/linux/build-rootfs").compile_program("store.c"))
    program.chmod(0o755)
    return program


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    program = tmp_path_factory.mktemp("sanitized") / "store"
    subprocess.run([*SANITIZED, str(program)], check=True)
    with running(program) as port:
        yield port


class Client:
    def __init__(self, port: int) -> None:
        self.link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        self.link.request(method, path, body)
        answer = self.link.getresponse()
        return answer.status, answer.read()


def test_it_keeps_what_it_is_given(bare: Path) -> None:
    with running(bare) as port, contextlib.closing(Client(port).link) as link:
        client = Client(port)
        client.link = link
        assert client.ask("GET", "/length") == (200, b"0\n")
        for number in range(20):
            assert client.ask("POST", "/append", b"entry %d" % number) == (200, b"%d\n" % number)
        assert client.ask("GET", "/log/7") == (200, b"entry 7")
        assert client.ask("GET", "/length") == (200, b"20\n")
        assert client.ask("GET", "/log/20")[0] == 404
        assert client.ask("GET", "/register") == (200, b"")
        assert client.ask("PUT", "/register", b"x" * 1024)[0] == 200
        assert client.ask("GET", "/register") == (200, b"x" * 1024)
        one, two = client.ask("GET", "/random")[1], client.ask("GET", "/random")[1]
        assert one != two and len(one) == 33
        assert int(client.ask("GET", "/time")[1]) > 0
        assert client.ask("DELETE", "/log/1")[0] == 405
        assert client.ask("GET", "/")[0] == 404


def test_a_file_outlives_the_process(bare: Path, tmp_path: Path) -> None:
    file = tmp_path / "log"
    for life in range(3):
        with running(bare, str(file)) as port, contextlib.closing(Client(port).link) as link:
            client = Client(port)
            client.link = link
            assert client.ask("POST", "/append", b"life %d" % life) == (200, b"%d\n" % life)
            assert client.ask("GET", "/log/0") == (200, b"life 0")
        with file.open("ab") as torn:
            torn.write(b"\x10\0\0\0torn")  # of an append that was cut off, and never answered
    assert file.read_bytes().count(b"life") == 3


def test_a_file_that_is_no_log_stays_as_it_is(bare: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes"
    file.write_bytes(b"something of somebody\n" * 10)
    done = subprocess.run([bare, "--port", "1", file], capture_output=True, timeout=10, check=False)
    assert (done.returncode, done.stderr) == (1, b"store: the file cannot be used\n")
    assert file.read_bytes() == b"something of somebody\n" * 10


def test_requests_sent_ahead_are_answered_in_their_order(sanitized: int) -> None:
    with socket.create_connection(("127.0.0.1", sanitized), 10) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # it has to wait for us, too
        link.sendall(b"".join(b"PUT /register HTTP/1.1\r\nContent-Length: 3\r\n\r\n%03d"
                              b"GET /register HTTP/1.1\r\n\r\n" % n for n in range(200)))  # fmt: skip
        got = b""
        while got.count(b"HTTP/1.1 200") < 400 or not got.endswith(b"199"):
            piece = link.recv(65536)
            assert piece
            got += piece
        assert [int(part[:3]) for part in got.split(b"Content-Length: 3\r\n\r\n")[1:]] == list(range(200))


def exchange(port: int, pieces: list[bytes]) -> bytes:
    """What comes back until the server closes, or has nothing to say."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), 10) as link, contextlib.suppress(OSError):
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            link.sendall(piece)
        link.shutdown(socket.SHUT_WR)
        while piece := link.recv(65536):
            got += piece
    return got


REFUSED = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "text",
    [
        b"x\r\n\r\n", b"GET /length\r\n\r\n", b"GET /length HTTP/2\r\n\r\n", b"A" * 2500,
        b"GET /length HTTP/1.1\r\n" + b"a: b\r\n" * 500,
        b"POST /append HTTP/1.1\r\nContent-Length: 1025\r\n\r\n",
        b"POST /append HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /append HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
        b"POST /append HTTP/1.1\r\nContent-Length : 5\r\n\r\nhello",
        b"POST /append HTTP/1.1\r\n Content-Length: 5\r\n\r\nhello",
        b"POST /append HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /length HTTP/1.1\r\nno colon\r\n\r\n", b"GET /length HTTP/1.1\r\n: no name\r\n\r\n",
    ],
)  # fmt: skip
def test_a_request_that_is_none_gets_400_does_nothing_and_is_the_last(bare: Path, text: bytes) -> None:
    with running(bare) as port:
        with socket.create_connection(("127.0.0.1", port), 10) as link, contextlib.suppress(ConnectionResetError):
            link.sendall(text)
            got = b""
            while piece := link.recv(65536):  # until it closes: we do not
                got += piece
        assert got == REFUSED
        assert exchange(port, [b"GET /length HTTP/1.1\r\n\r\n"]).endswith(b"\r\n\r\n0\n")


LINES = st.sampled_from([
    b"GET / HTTP/1.1", b"POST /append HTTP/1.1", b"PUT /register HTTP/1.0", b"GET /log/999999999999 HTTP/1.1", b"GET",
    b"GET /length HTTP/2", b"Content-Length: 5", b"Content-Length: 99999999999", b"Content-Length: -1", b": : :", b"",
    b"content-length:5", b"Connection: close", b"Transfer-Encoding: chunked", b"x" * 3000, b"hello", b"\0", b"\r",
])  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=8), cut=st.integers(0, 200), ends=st.sampled_from([b"\r\n", b"\n", b""]))
def test_nothing_that_is_no_request_ends_it(sanitized: int, lines: list[bytes], cut: int, ends: bytes) -> None:
    text = b"\r\n".join(lines) + ends
    got = exchange(sanitized, [text[:cut], text[cut:]] if cut < len(text) else [text])
    assert not got or got.startswith(b"HTTP/1.1 ")
    assert exchange(sanitized, [b"GET /time HTTP/1.1\r\n\r\n"]).startswith(b"HTTP/1.1 200 OK\r\n")


def test_more_connections_than_it_has_places_for(sanitized: int) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(80):
            stack.enter_context(socket.create_connection(("127.0.0.1", sanitized), 10))
        time.sleep(0.1)
    for _ in range(100):  # the closed ones make room again
        if exchange(sanitized, [b"GET /time HTTP/1.1\r\n\r\n"]):
            return
        time.sleep(0.05)
    raise AssertionError("it does not answer any more")
