"""Migration over TLS: who is let in, who is believed, and that nothing readable crosses the wire."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from pyvmm.errors import ChannelError, ConfigError, PyvmmError
from pyvmm.migration.channel import Channel, Listener, connect
from pyvmm.migration.tls import make_credentials


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tls") / "mine"
    make_credentials(made, ["localhost", "127.0.0.1"])
    return made


def meet(server: str, client: str, *, hostname: str = "") -> tuple[bytes | PyvmmError, bytes | PyvmmError]:
    """What each side got from the other, or its error."""
    listener = Listener("tcp:127.0.0.1:0")
    uri = f"tcp:127.0.0.1:{listener.port}"
    got: list[bytes | PyvmmError] = [b"", b""]

    def talk(channel: Channel, me: int) -> bytes:
        try:
            channel.send(1, b"from %d" % me)
            return bytes(channel.receive()[1])
        finally:
            channel.close()

    def serve() -> None:
        try:
            got[0] = talk(listener.accept(timeout=5.0, stall=3.0, tls_creds=server), 0)
        except PyvmmError as error:
            got[0] = error

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        got[1] = talk(connect(uri, timeout=5.0, stall=3.0, tls_creds=client, tls_hostname=hostname), 1)
    except PyvmmError as error:
        got[1] = error
    thread.join(20)
    listener.close()
    return got[0], got[1]


def test_both_sides_with_credentials_of_one_authority(folder: Path) -> None:
    assert meet(str(folder), str(folder)) == (b"from 1", b"from 0")
    assert meet(str(folder), str(folder), hostname="localhost") == (b"from 1", b"from 0")


def test_a_certificate_for_another_host_is_not_believed(folder: Path) -> None:
    server, client = meet(str(folder), str(folder), hostname="elsewhere.example")
    assert isinstance(client, ChannelError) and "TLS" in str(client)
    assert isinstance(server, ChannelError)


def test_another_authority_is_believed_by_neither_side(folder: Path, tmp_path: Path) -> None:
    make_credentials(tmp_path / "other", ["127.0.0.1"])
    for server, client in ((folder, tmp_path / "other"), (tmp_path / "other", folder)):
        results = meet(str(server), str(client))
        assert all(isinstance(result, ChannelError) for result in results)


def test_a_client_without_a_certificate_gets_nothing(folder: Path, tmp_path: Path) -> None:
    """It has the authority, so it believes the server; but the server does not believe a self-made client."""
    make_credentials(tmp_path / "mix", ["127.0.0.1"])
    (tmp_path / "mix" / "ca-cert.pem").write_bytes((folder / "ca-cert.pem").read_bytes())
    server, client = meet(str(folder), str(tmp_path / "mix"))
    assert isinstance(server, ChannelError) and isinstance(client, ChannelError)


def test_one_side_without_tls_is_an_error_not_a_hang(folder: Path) -> None:
    for server, client in ((str(folder), ""), ("", str(folder))):
        results = meet(server, client)
        assert all(isinstance(result, ChannelError) for result in results)


def test_nothing_readable_crosses_the_wire(folder: Path) -> None:
    seen = bytearray()
    listener = Listener("tcp:127.0.0.1:0")
    with socket.create_server(("127.0.0.1", 0)) as middle:
        middle.settimeout(5)

        def eavesdrop() -> None:
            near, _ = middle.accept()
            far = socket.create_connection(("127.0.0.1", listener.port), 5)

            def carry(source: socket.socket, target: socket.socket) -> None:
                try:
                    while data := source.recv(4096):
                        seen.extend(data)
                        target.sendall(data)
                    target.shutdown(socket.SHUT_WR)
                except OSError:
                    pass

            back = threading.Thread(target=carry, args=(far, near))
            back.start()
            carry(near, far)
            back.join(5)
            near.close()
            far.close()

        def serve() -> None:
            channel = listener.accept(timeout=5.0, stall=3.0, tls_creds=str(folder))
            assert bytes(channel.receive()[1]) == b"guest memory" * 10
            channel.close()

        threads = [threading.Thread(target=eavesdrop), threading.Thread(target=serve)]
        for thread in threads:
            thread.start()
        uri = f"tcp:127.0.0.1:{middle.getsockname()[1]}"
        channel = connect(uri, timeout=5.0, stall=3.0, tls_creds=str(folder))
        channel.send(1, b"guest memory" * 10)
        with pytest.raises(ChannelError):
            channel.receive()
        channel.close()
        for thread in threads:
            thread.join(20)
    assert len(seen) > 1000 and b"guest memory" not in seen


def test_credentials_are_private_and_never_overwritten(tmp_path: Path) -> None:
    files = make_credentials(tmp_path / "new", ["localhost"])
    assert len(files) == 5 and all(path.stat().st_mode & 0o077 == 0 for path in files)
    before = [path.read_bytes() for path in files]
    with pytest.raises(ConfigError, match="exists: name another folder"):
        make_credentials(tmp_path / "new", ["localhost"])
    assert before == [path.read_bytes() for path in files]


def test_missing_and_broken_credentials_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca-cert\.pem is missing: make credentials with pyvmm certs"):
        connect_to_nothing(tmp_path)
    make_credentials(tmp_path, ["localhost"])
    (tmp_path / "client-key.pem").write_text("nonsense")
    with pytest.raises(ConfigError, match="client's credentials cannot be used"):
        connect_to_nothing(tmp_path)


def connect_to_nothing(folder: Path) -> None:
    one, other = socket.socketpair()
    with other:
        connect(f"fd:{one.detach()}", timeout=1.0, stall=1.0, tls_creds=str(folder))
