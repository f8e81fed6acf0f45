"""The console, the balloon and the sockets with Linux's own drivers, and vector registers, in one boot."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.framework.guest_programs import initramfs_with
from tests.framework.processes import Running
from tests.linux.conftest import BOOT_DEADLINE as ONE_BOOT

BOOT_DEADLINE = 1.5 * ONE_BOOT
"""Much is asked of this one."""
pytestmark = [pytest.mark.linux, pytest.mark.timeout(BOOT_DEADLINE + 60)]

SIZE = 70_000
"""More than the credit of either side, so that it has to be renewed."""
DATA = bytes(i * 31 >> 3 & 0xFF for i in range(SIZE))
COMMANDS = [
    # Console: a line out, a line in. (Linux drops what comes before it has set its console up.)
    "exec 3<>/dev/hvc0; echo ready >&3; read line <&3; echo \"from the host: $line\"; echo \"it said: $line\" >&3",
    # Sockets, both ways, and a port where nobody listens on the host.
    "/host_streams connect 5000; /host_streams connect 5001",
    "/host_streams listen 6000",
    # The balloon takes its time; the host says when it has what it wants.
    "exec 3<>/dev/hvc0; echo waiting >&3; read line <&3; echo \"and then: $line\"",
    "/vector_registers",
]
PROGRAMS = [Path(__file__).with_name(name) for name in ("host_streams.c", "vector_registers.c")]


def start(target: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=target)
    thread.start()
    return thread


def connect(path: Path, deadline: float) -> socket.socket:
    """A client of the unix socket ``path``, once there is one."""
    while True:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            client.connect(str(path))
            client.settimeout(BOOT_DEADLINE)
            return client
        except OSError:
            client.close()
            assert time.monotonic() < deadline, f"nobody listens on {path}"
            time.sleep(0.1)


def read_exactly(stream: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        piece = stream.recv(size - len(got))
        assert piece, f"{len(got)} of {size} bytes came"
        got += piece
    return got


def read_until(stream: socket.socket, end: bytes) -> bytes:
    got = b""
    while not got.endswith(end):
        piece = stream.recv(1)
        assert piece, f"{end!r} did not come, but {got!r}"
        got += piece
    return got


def send_all(stream: socket.socket) -> None:
    stream.sendall(DATA)
    stream.shutdown(socket.SHUT_WR)


def to_guest_port(path: Path, port: int, deadline: float) -> socket.socket:
    """A stream to a port that the guest may not listen on yet."""
    while True:
        client = connect(path, deadline)
        client.sendall(b"CONNECT %d\n" % port)
        answer = client.recv(100)
        if answer:
            assert re.fullmatch(rb"OK \d+\n", answer)
            return client
        client.close()
        assert time.monotonic() < deadline, f"the guest never listened on port {port}"
        time.sleep(0.3)


@dataclass
class Session:
    """One boot: what the guest printed, what each of the host's ends got, and the trace."""

    text: str = ""
    seen: dict[str, bytes] = field(default_factory=dict)
    trace: str = ""
    left: list[Path] = field(default_factory=list)


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    tmp_path = tmp_path_factory.mktemp("ports")
    initrd = initramfs_with(tmp_path, *PROGRAMS)
    vsock, console = tmp_path / "vsock", tmp_path / "console"
    trace = tmp_path / "trace"
    deadline = time.monotonic() + BOOT_DEADLINE
    seen: dict[str, bytes] = {}

    def serve_guest() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(f"{vsock}_5000")
            listener.listen()
            listener.settimeout(BOOT_DEADLINE)
            stream, _ = listener.accept()
            with stream:
                stream.settimeout(BOOT_DEADLINE)
                stream.sendall(read_exactly(stream, len(b"hello host\n")))
                stream.sendall(DATA)
                seen["connected"] = read_exactly(stream, SIZE)
                seen["end"] = stream.recv(1)

    def use_guest() -> None:
        with to_guest_port(vsock, 6000, deadline) as stream:
            writer = start(lambda: send_all(stream))
            seen["accepted"] = read_exactly(stream, SIZE)
            seen["accepted end"] = stream.recv(1)
            writer.join()

    def use_console() -> None:
        with connect(console, deadline) as client:
            read_until(client, b"ready\r\n")
            client.sendall(b"a line\n")
            seen["console"] = read_until(client, b"it said: a line\r\n")
            read_until(client, b"waiting\r\n")
            while "8388608 bytes of 8388608\n" not in trace.read_text() and time.monotonic() < deadline:
                time.sleep(0.2)
            client.sendall(b"go\n")
            client.recv(100)

    exec_words = [word for command in COMMANDS for word in ("--exec", command)]
    with Running(
        "linux", "--memory", "128M", "--initrd", str(initrd), "--timeout", str(BOOT_DEADLINE),
        "--vsock", f"3,unix:{vsock}", "--virtconsole", f"unix:{console}", "--balloon", "target=8M",
        "--trace", f"virtio_balloon_*,file={trace}", *exec_words,
    ) as vmm:  # fmt: skip
        threads = [start(serve_guest), start(use_guest), start(use_console)]
        status, out, err = vmm.finish(BOOT_DEADLINE + 30)
        for thread in threads:
            thread.join(30)
    text = out.decode(errors="replace") + err.decode(errors="replace")
    print(text)
    assert status == 0, text
    return Session(text, seen, trace.read_text(), [path for path in (vsock, console) if os.path.exists(path)])


def test_console_sockets_and_balloon_serve_linux(session: Session) -> None:
    text, seen = session.text, session.seen
    assert "from the host: a line\n" in text and seen["console"].endswith(b"it said: a line\r\n")
    assert f"connected: {SIZE} bytes each way\n" in text and seen["connected"] == DATA and seen["end"] == b""
    assert "connect: Connection reset by peer\n" in text
    assert f"accepted: {SIZE} bytes each way\n" in text and seen["accepted"] == DATA and seen["accepted end"] == b""
    assert "and then: go\n" in text
    assert "8388608 bytes of 8388608\n" in session.trace
    given = [int(count) for count in re.findall(r"pages listed, (\d+) given back", session.trace)]
    assert sum(given) == (8 << 20) // 4096
    assert not session.left


def test_vector_registers_survive_task_switches(session: Session) -> None:
    """What user code keeps in them, also where XSAVE is carried out by pyvmm."""
    assert re.search("^(kept|no AVX)$", session.text, re.MULTILINE), session.text
