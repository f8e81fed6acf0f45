"""A host's disk that does not answer: a write of the running machine is held in its system call."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyvmm.qmp.client import CommandError, QmpClient, open_client
from tests.framework import syscall_faults
from tests.framework.processes import REPOSITORY

pytestmark = [pytest.mark.kvm, pytest.mark.timeout(120)]

GUEST = REPOSITORY / "guests" / "disk-reader" / "disk-reader.elf"
IO_DEADLINE = 1.5
PROGRAM = f"import sys; import pyvmm.virtio.blk as blk; blk.IO_DEADLINE = {IO_DEADLINE}; import pyvmm.cli as cli; " \
    "sys.exit(cli.main())"  # fmt: skip


class HungMachine:
    """A machine one of whose writes hangs. ``process`` is its tracer, which hands signals on."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.image = folder / "disk.img"
        self.image.write_bytes(bytes(4 << 20))
        self.report = folder / "report.json"
        self.socket = folder / "qmp"
        log = folder / "faults"
        program = [sys.executable, "-c", PROGRAM, "run", str(GUEST), "--memory", "32M", "--append",
                   "size=4096 requests=20 write=1", "--disk", str(self.image), "--report", str(self.report),
                   "--qmp", f"unix:{self.socket}", *options]  # fmt: skip
        self.process = subprocess.Popen(
            syscall_faults.command(log, ["pwritev2:disk.img:hang:3:1"], *program), cwd=REPOSITORY,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        until = time.monotonic() + 30
        while not log.exists() or not log.read_text():
            assert self.process.poll() is None and time.monotonic() < until, self.process.communicate()
            time.sleep(0.02)

    @property
    def line(self) -> str:
        return f"pyvmm: disk {self.image}: a request did not end within {IO_DEADLINE:g} s; is the host's disk well?\n"

    def client(self) -> QmpClient:
        return open_client(f"unix:{self.socket}", 20)

    def release(self) -> None:
        self.process.send_signal(signal.SIGUSR1)

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@contextmanager
def hung_machine(folder: Path, *options: str) -> Iterator[HungMachine]:
    machine = HungMachine(folder, *options)
    try:
        yield machine
    finally:
        machine.process.kill()
        machine.process.communicate(timeout=20)


def by_sigterm(machine: HungMachine) -> None:
    machine.process.terminate()


def by_quit(machine: HungMachine) -> None:
    with machine.client() as client:
        client.execute("quit")


@pytest.mark.parametrize(("end", "kind"), [(by_sigterm, "quit"), (by_quit, "quit")])
def test_it_ends_in_time_and_names_the_disk(tmp_path: Path, end: Callable[[HungMachine], None], kind: str) -> None:
    with hung_machine(tmp_path) as machine:
        start = time.monotonic()
        end(machine)
        status, _, errors = machine.finish()
        took = time.monotonic() - start
        assert (status, errors) == (125, machine.line)
        assert IO_DEADLINE < took < IO_DEADLINE + 5, took
        report = json.loads(machine.report.read_text())
        assert (report["kind"], report["status"]) == (kind, 125) and "pyvmm: " + report["reason"] + "\n" == errors


def test_a_guest_out_of_time_on_a_disk_that_hangs(tmp_path: Path) -> None:
    """What has to be mended is the disk, so that is what is said."""
    with hung_machine(tmp_path, "--timeout", "3") as machine:
        status, _, errors = machine.finish()
        assert (status, errors) == (125, machine.line)
        assert json.loads(machine.report.read_text())["kind"] == "timeout"


def test_a_reset_cannot_go_over_a_write_that_is_under_way(tmp_path: Path) -> None:
    with hung_machine(tmp_path) as machine:
        with machine.client() as client:
            client.execute("system_reset")
        status, _, errors = machine.finish()
        assert (status, errors) == (125, machine.line)


def test_a_stop_that_fails_names_the_disk_and_the_guest_goes_on(tmp_path: Path) -> None:
    with hung_machine(tmp_path) as machine:
        with machine.client() as client:
            with pytest.raises(CommandError, match=f"disk {machine.image}: a request did not end within"):
                client.execute("stop")
            assert client.execute("query-status")["status"] == "running"
            machine.release()
        status, out, errors = machine.finish()
        assert (status, errors) == (33, "") and "done" in out


def test_a_disk_that_answers_again_in_time_costs_nothing(tmp_path: Path) -> None:
    with hung_machine(tmp_path) as machine:
        machine.process.terminate()
        time.sleep(0.3)
        machine.release()
        status, _, errors = machine.finish()
        assert (status, errors) == (128 + signal.SIGTERM, "pyvmm: ended by SIGTERM\n")
