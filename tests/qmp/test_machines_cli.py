"""``pyvmm list``, ``status``, ``stop``...: running machines by name, as a user sees them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.framework.migrating import free_port
from tests.framework.processes import Running, pyvmm, refused
from tests.framework.real_mode import COUNT_FOREVER, SPIN, image
from tests.qmp.conftest import QmpMachine

Start = Callable[..., QmpMachine]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def listed() -> list[dict[str, Any]]:
    done = pyvmm("list", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


def done(*arguments: str) -> str:
    result = pyvmm(*arguments)
    assert (result.returncode, result.stderr) == (0, b""), result
    return result.stdout.decode()


def test_a_machines_life_by_name(machine_with_qmp: Start) -> None:
    assert done("list") == "" and listed() == []
    machine = machine_with_qmp(COUNT_FOREVER, "--name", "one", "--smp", "2", "--memory", "16M")
    facts = {"name": "one", "status": "running", "cpus": 2, "memory": 16 << 20, "pid": machine.running.process.pid}
    assert listed() == [facts]
    text = done("list").splitlines()
    assert text[0].split() == ["NAME", "STATUS", "CPUS", "MEMORY", "PID"]
    assert text[1].split() == ["one", "running", "2", "16", "MiB", str(facts["pid"])]
    assert done("stop", "one") == ""
    assert "paused" in done("status", "one")
    assert done("stop", "one") == "" and done("cont", "one") == ""
    assert json.loads(done("status", "one", "--json")) == facts
    assert done("reset", "one") == "" and done("powerdown", "one") == ""
    assert done("status", f"unix:{machine.path}", "--json") == done("status", "one", "--json")
    assert done("quit", "one") == ""
    assert machine.running.finish()[0] == 0
    assert listed() == []
    assert "no running machine is called 'one'; none is running" in refused("status", "one")


def test_several_machines_and_one_that_is_killed(machine_with_qmp: Start, runtime: Path) -> None:
    started = [machine_with_qmp(SPIN, name=f"guest{n}") for n in range(3)]
    assert [row["name"] for row in listed()] == ["guest0.bin", "guest1.bin", "guest2.bin"]
    started[1].running.process.send_signal(signal.SIGKILL)
    started[1].running.process.wait(10)
    assert (runtime / "pyvmm" / "guest1.bin.sock").exists(), "left behind"
    assert "there is guest0.bin, guest2.bin" in refused("stop", "guest1.bin")
    assert [row["name"] for row in listed()] == ["guest0.bin", "guest2.bin"]
    assert not (runtime / "pyvmm" / "guest1.bin.sock").exists()


def test_names_that_clash(machine_with_qmp: Start, tmp_path: Path) -> None:
    machine_with_qmp(SPIN)
    second = Running("run", image(tmp_path, SPIN, "guest.bin"), "--timeout", "60")
    with second:
        deadline = time.monotonic() + 20
        while len(listed()) < 2:
            assert time.monotonic() < deadline and second.process.poll() is None
        assert [row["name"] for row in listed()] == ["guest.bin", "guest.bin-2"]
        text = refused("run", image(tmp_path, SPIN), "--name", "guest.bin-2")
        assert "--name guest.bin-2: a machine of that name is running" in text
        assert "write 1 to 64 letters" in refused("run", image(tmp_path, SPIN), "--name", "a/b")
        done("quit", "guest.bin-2")
        assert second.finish()[0] == 0


def test_a_stopped_process_is_listed_as_not_answering(machine_with_qmp: Start) -> None:
    machine = machine_with_qmp(SPIN)
    machine.running.process.send_signal(signal.SIGSTOP)
    try:
        row = listed()[0]
        assert (row["name"], row["status"]) == ("guest.bin", "not answering")
        assert "not answering" in done("list")
    finally:
        machine.running.process.send_signal(signal.SIGCONT)


def test_without_control_it_is_not_found(machine_with_qmp: Start, runtime: Path) -> None:
    machine = machine_with_qmp(SPIN, "--no-control")
    assert listed() == [] and not (runtime / "pyvmm").exists()
    assert done("status", f"unix:{machine.path}").startswith("name")


def test_a_folder_that_cannot_be_had_costs_one_line_not_the_machine(tmp_path: Path, runtime: Path) -> None:
    (runtime / "pyvmm").mkdir()
    (runtime / "pyvmm").chmod(0o777)
    result = pyvmm("run", image(tmp_path, b"\xfa\xf4"))
    assert result.returncode == 0
    assert result.stderr.count(b"\n") == 1 and b"no control socket" in result.stderr
    assert "closed to others" in refused("list")


def test_only_its_user_can_reach_it(machine_with_qmp: Start, runtime: Path) -> None:
    machine_with_qmp(SPIN, "--name", "mine")
    folder = os.stat(runtime / "pyvmm")
    assert (folder.st_uid, stat.S_IMODE(folder.st_mode)) == (os.geteuid(), 0o700)


def test_list_is_not_kept_waiting_by_another_client(machine_with_qmp: Start, runtime: Path) -> None:
    machine_with_qmp(SPIN, "--name", "busy")
    with socket.socket(socket.AF_UNIX) as idle:
        with contextlib.chdir(runtime / "pyvmm"):
            idle.connect("busy.sock")
        assert listed()[0]["status"] == "running"


@pytest.mark.parametrize("options", [["--qmp", "unix:"], ["--qmp", "tcp:nowhere"], ["--qmp", "x"]])
def test_endpoints_that_cannot_be(tmp_path: Path, options: list[str]) -> None:
    assert "write unix:PATH or tcp:HOST:PORT" in refused("run", image(tmp_path, SPIN), *options)


def test_two_monitors_and_tcp(machine_with_qmp: Start, tmp_path: Path) -> None:
    port = free_port()
    machine = machine_with_qmp(SPIN, "--qmp", f"tcp:127.0.0.1:{port}", "--qmp", f"unix:{tmp_path}/third")
    assert "running" in done("status", f"tcp:127.0.0.1:{port}")
    with machine.client() as first:
        done("stop", f"unix:{tmp_path}/third")
        event = first.next_event(10)
        assert event is not None and event["event"] == "STOP", "events go to every monitor"
