"""The machine as an unmodified client sees it: the qemu.qmp library from PyPI, and its qmp-shell."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import EventListener, ExecuteError, QMPClient

from tests.framework.real_mode import COUNT_FOREVER, HLT_FOREVER, SPIN, TRIPLE_FAULT, out8
from tests.qmp.conftest import QmpMachine

Start = Callable[..., QmpMachine]
RESET = out8(0x64, 0xFE)


def with_client(path: Path, story: Callable[[QMPClient], Awaitable[None]]) -> None:
    """Run ``story`` with a connected library client."""

    async def tell() -> None:
        client = QMPClient("test")
        await client.connect(str(path))
        try:
            await story(client)
        finally:
            with contextlib.suppress(EOFError):  # the machine may have hung up first
                await client.disconnect()

    asyncio.run(asyncio.wait_for(tell(), 60))


async def status(client: QMPClient) -> Any:
    answer = await client.execute("query-status")
    assert isinstance(answer, dict)
    return answer["status"]


async def event(events: EventListener, name: str) -> dict[str, Any]:
    """The next event, which must be ``name``."""
    got = await asyncio.wait_for(events.get(), 20)
    assert got["event"] == name, got
    stamp = got["timestamp"]
    assert isinstance(stamp, dict) and abs(stamp["seconds"] - time.time()) < 60 and 0 <= stamp["microseconds"] < 10**6
    data = got.get("data", {})
    assert isinstance(data, dict)
    return data


def test_stop_and_cont_with_their_events(machine_with_qmp: Start) -> None:
    async def story(client: QMPClient) -> None:
        with client.listener() as events:
            assert await status(client) == "running"
            await client.execute("stop")
            await event(events, "STOP")
            assert await client.execute("query-status") == {"status": "paused", "singlestep": False, "running": False}
            await client.execute("stop")  # nothing to do, no event
            await client.execute("cont")
            await event(events, "RESUME")
            await client.execute("cont")
            await client.execute("system_reset")
            assert await event(events, "RESET") == {"guest": False, "reason": "host-qmp-system-reset"}
            assert await status(client) == "running"
            await client.execute("system_powerdown")
            await event(events, "POWERDOWN")
            assert events.empty()

    with_client(machine_with_qmp(COUNT_FOREVER).path, story)


def test_quit_ends_the_process_in_order(machine_with_qmp: Start) -> None:
    machine = machine_with_qmp(SPIN)

    async def story(client: QMPClient) -> None:
        with client.listener() as events:
            await client.execute("quit")
            assert await event(events, "SHUTDOWN") == {"guest": False, "reason": "host-qmp-quit"}

    with_client(machine.path, story)
    assert machine.running.finish()[0] == 0
    assert not machine.path.exists()


@pytest.mark.parametrize(
    ("code", "options", "events", "code_of_exit"),
    [
        (HLT_FOREVER, [], [("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})], 0),
        (out8(0xF4, 3), [], [("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})], 7),
        (RESET, ["--no-reboot"], [("SHUTDOWN", {"guest": True, "reason": "guest-reset"})], 0),
        (RESET + HLT_FOREVER, [], [("RESET", {"guest": True, "reason": "guest-reset"})], None),
        (TRIPLE_FAULT, [], [("GUEST_PANICKED", {"action": "poweroff"}),
                            ("SHUTDOWN", {"guest": True, "reason": "guest-panic"})], 126),
    ],
)  # fmt: skip
def test_the_guests_own_ends(
    machine_with_qmp: Start, code: bytes, options: list[str], events: list[Any], code_of_exit: int | None
) -> None:
    machine = machine_with_qmp(code, "-S", *options)

    async def story(client: QMPClient) -> None:
        with client.listener() as listener:
            assert await status(client) == "prelaunch"
            await client.execute("cont")
            await event(listener, "RESUME")
            for name, data in events:
                assert await event(listener, name) == data

    with_client(machine.path, story)
    if code_of_exit is not None:
        assert machine.running.finish()[0] == code_of_exit


def test_no_shutdown_keeps_the_machine_until_it_is_reset_or_quit(machine_with_qmp: Start) -> None:
    machine = machine_with_qmp(out8(0xF4, 3), "-S", "--no-shutdown")

    async def story(client: QMPClient) -> None:
        with client.listener() as events:
            for _ in range(2):
                await client.execute("cont")
                await event(events, "RESUME")
                assert (await event(events, "SHUTDOWN"))["guest"]
                assert await status(client) == "shutdown"
                with pytest.raises(ExecuteError, match="Resetting the Virtual Machine is required"):
                    await client.execute("cont")
                await client.execute("stop")
                await client.execute("system_reset")
                await event(events, "RESET")
                assert await status(client) == "prelaunch"
            await client.execute("cont")
            await event(events, "RESUME")
            await event(events, "SHUTDOWN")
            await client.execute("quit")
            assert (await event(events, "SHUTDOWN"))["reason"] == "host-qmp-quit"

    with_client(machine.path, story)
    assert machine.running.finish()[0] == 7, "the guest's own end counts"


def test_errors_have_classes_and_ids_come_back(machine_with_qmp: Start) -> None:
    async def story(client: QMPClient) -> None:
        with pytest.raises(ExecuteError) as caught:
            await client.execute("no-such")
        assert (caught.value.error_class, str(caught.value)) == (
            "CommandNotFound", "The command no-such has not been found"
        )  # fmt: skip
        with pytest.raises(ExecuteError) as caught:
            await client.execute("stop", {"x": 1})
        assert (caught.value.error_class, str(caught.value)) == ("GenericError", "Parameter 'x' is unexpected")
        with pytest.raises(ExecuteError, match="does not support OOB"):
            await client.execute("stop", oob=True)
        assert await client.execute("query-version", oob=True) == await client.execute("query-version")

    with_client(machine_with_qmp(SPIN).path, story)


def test_the_machine_describes_itself(machine_with_qmp: Start) -> None:
    machine = machine_with_qmp(SPIN, "--smp", "2", "--name", "two", "--memory", "16M")

    async def story(client: QMPClient) -> None:
        assert await client.execute("query-name") == {"name": "two"}
        assert await client.execute("query-kvm") == {"enabled": True, "present": True}
        assert await client.execute("query-memory-size-summary") == {"base-memory": 16 << 20, "plugged-memory": 0}
        cpus = await client.execute("query-cpus-fast")
        assert isinstance(cpus, list)
        assert [cpu["cpu-index"] for cpu in cpus] == [0, 1]
        for cpu in cpus:
            assert Path(f"/proc/{machine.running.process.pid}/task/{cpu['thread-id']}").exists()

    with_client(machine.path, story)


def test_a_client_that_goes_in_the_middle_leaves_room_for_the_next(machine_with_qmp: Start) -> None:
    machine = machine_with_qmp(COUNT_FOREVER)
    hello = b'{"execute":"qmp_capabilities"}'
    for text in (b"", b'{"exec', hello, hello + b'{"execute":"stop"}', hello + b'{"execute":"query-qmp-schema"}' * 50):
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(machine.path))
            link.recv(10)
            link.sendall(text)
    with machine.client() as client:
        assert client.execute("query-status")["status"] in ("running", "paused")


def test_descriptors_are_handed_over_named_and_closed(machine_with_qmp: Start, tmp_path: Path) -> None:
    machine = machine_with_qmp(SPIN)
    mine = tmp_path / "handed-over"
    mine.touch()

    def held() -> int:
        folder = Path(f"/proc/{machine.running.process.pid}/fd")
        return sum(os.readlink(fd) == str(mine) for fd in folder.iterdir() if fd.is_symlink())

    with machine.client() as client, mine.open() as file:
        def send(name: str, fds: list[int]) -> None:
            message = {"execute": "getfd", "arguments": {"fdname": name}, "id": "fd"}
            socket.send_fds(client._link, [json.dumps(message).encode()], fds)

        def answer() -> dict[str, Any]:
            return client._line(time.monotonic() + 20)

        send("one", [file.fileno()])
        assert answer() == {"return": {}, "id": "fd"} and held() == 1
        send("one", [file.fileno()])  # replaces the first
        assert answer() == {"return": {}, "id": "fd"} and held() == 1
        send("1st", [file.fileno()])
        assert "not starting with a digit" in answer()["error"]["desc"] and held() == 1
        client.execute("closefd", {"fdname": "one"})
        assert held() == 0
        send("none", [])
        assert "No file descriptor supplied" in answer()["error"]["desc"]
        for number in range(40):
            send(f"n{number}", [file.fileno()])
            answer()
        assert held() == 32
        send("spare", [file.fileno()] * 3)
        answer()
        assert held() == 34, "two are not named yet"
    with machine.client() as client:
        assert held() == 32, "with their client the unnamed ones went"


def test_whatever_bytes_come_the_machine_runs_on(machine_with_qmp: Start) -> None:
    machine = machine_with_qmp(COUNT_FOREVER)
    source = random.Random(7)
    hello = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'
    words = [hello, b'{"execute":"stop"}', b'{"exec-oob":"query-status"}', b'{"execute":', b"[" * 50, b"}" * 50, b"\\",
             b"\xff\x00", b"9" * 5000, b'{"execute":"memsave","arguments":{"val":-1}}', b"\n", b'"id":' + b"[" * 200,
             b'"']  # fmt: skip
    for _ in range(60):
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(20)
            link.connect(str(machine.path))
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                link.sendall(hello * source.randint(0, 1))
                for _ in range(source.randint(1, 8)):
                    link.sendall(source.choice(words) + source.randbytes(source.randint(0, 4)))
                link.shutdown(socket.SHUT_WR)
                while link.recv(65536):
                    pass
    with machine.client() as client:
        client.execute("cont")
        assert client.execute("query-status")["running"]
        client.execute("quit")
    status, _, err = machine.running.finish()
    assert (status, err) == (0, b"")


def test_one_client_at_a_time_the_next_one_waits(machine_with_qmp: Start) -> None:
    machine = machine_with_qmp(SPIN)
    with machine.client(), socket.socket(socket.AF_UNIX) as second:
        second.settimeout(0.3)
        second.connect(str(machine.path))
        with pytest.raises(TimeoutError):
            second.recv(1)
        first_is_gone = second.dup()
    with first_is_gone:
        first_is_gone.settimeout(20)
        assert first_is_gone.recv(8) == b'{"QMP": '


def test_a_client_that_does_not_read_is_cut_off_and_the_machine_runs_on(machine_with_qmp: Start) -> None:
    machine = machine_with_qmp(COUNT_FOREVER)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(machine.path))
        link.setblocking(False)
        message = b'{"execute":"qmp_capabilities"}' + b'{"execute":"query-qmp-schema"}' * 1000
        sent = 0
        deadline = time.monotonic() + 30
        cut = False
        while not cut and time.monotonic() < deadline:
            try:
                sent += link.send(message[sent % len(message) :])
            except BlockingIOError:
                time.sleep(0.01)
            except (BrokenPipeError, ConnectionResetError):
                cut = True
        assert cut
    with machine.client() as client:
        assert client.execute("query-status")["running"]


def test_qmp_shell_on_a_terminal(machine_with_qmp: Start, tmp_path: Path) -> None:
    """The real qmp-shell, typed at."""
    machine = machine_with_qmp(COUNT_FOREVER)
    primary, terminal = pty.openpty()
    command = [sys.executable, "-c", "from qemu.qmp.qmp_shell import main; main()", str(machine.path)]
    environment = os.environ | {"TERM": "dumb", "HOME": str(tmp_path)}
    shell = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)

    got = ""

    def until(text: str) -> None:
        nonlocal got
        deadline = time.monotonic() + 30
        while text not in got:
            ready, _, _ = select.select([primary], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come, but {got!r}"
            got += os.read(primary, 4096).decode()
        got = got.partition(text)[2]

    try:
        until("(QEMU) ")
        for line, answer in [
            ("query-status", '"status": "running"'),
            ("stop", '{"return": {}}'),
            ("query-status", '"status": "paused"'),
            ("cont", '{"return": {}}'),
            ("no-such", "has not been found"),
            ("query-kvm", '"present": true'),
        ]:
            os.write(primary, line.encode() + b"\n")
            until(answer)
            until("(QEMU) ")
        os.write(primary, b"quit\n")
        until("quit")
        assert machine.running.finish()[0] == 0
    finally:
        shell.kill()
        shell.wait(10)
        os.close(primary)


def test_the_schema_resolves_and_names_every_command(machine_with_qmp: Start) -> None:
    """As a client (libvirt, qapi's own tools) walks it: every reference leads to an entry."""
    with machine_with_qmp(SPIN).client() as client:
        schema = client.execute("query-qmp-schema")
        commands = {entry["name"] for entry in client.execute("query-commands")}
    by_name = {entry["name"]: entry for entry in schema}
    assert len(by_name) == len(schema)
    assert {e["name"] for e in schema if e["meta-type"] == "command"} == commands
    for entry in schema:
        references = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
        references += [member["type"] for member in entry.get("members", []) if entry["meta-type"] == "object"]
        assert all(reference in by_name for reference in references), entry
        if entry["meta-type"] == "event":
            assert by_name[entry["arg-type"]]["meta-type"] == "object"
    assert by_name["query-status"]["allow-oob"] is True and "allow-oob" not in by_name["stop"]
    assert json.dumps(by_name["STOP"])
