"""The virtio console on the serial line's backend: flow control both ways, clients that come, stall and go."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pyvmm.errors import ConfigError
from pyvmm.machine.device_config import ConsoleConfig, VsockConfig
from pyvmm.machine.event_loop import EventLoop
from pyvmm.machine.virtio_makers import make_device
from pyvmm.virtio.console import RECEIVE, TRANSMIT, VirtioConsole
from tests.unit.virtio.device_bench import DeviceBench
from tests.unit.virtio.fake_driver import DATA_REGION, RING_REGION, Buffer, Ram, ram

DATA = DATA_REGION[0]
BIG = (0x100000, 0x10000)
REGIONS = (RING_REGION, DATA_REGION, BIG)


class Wired:
    """The console as the builder makes it, with a driver, and a loop whose rounds serve the bells."""

    def __init__(self, memory: Ram, path: Path) -> None:
        self.loop = EventLoop()
        self.path = path
        machine: Any = SimpleNamespace(loop=self.loop, vm=SimpleNamespace(native=memory.table))
        self.console = make_device(machine, ConsoleConfig(path=str(path)))
        assert isinstance(self.console, VirtioConsole)
        self.bench = DeviceBench(memory, self.console)
        self.bench.negotiate()

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            self.loop.run_once(0.01)
            self.bench.serve()

    def client(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(self.path))
        client.settimeout(10)
        self.loop.run_once(0.5)
        return client

    def __enter__(self) -> Wired:
        return self

    def __exit__(self, *_error: object) -> None:
        self.console.close()
        self.loop.close()
        assert not self.path.exists()


def test_a_client_that_does_not_read_stalls_the_driver_not_the_loop(tmp_path: Path) -> None:
    piece = BIG[1]
    with ram(*REGIONS) as memory, Wired(memory, tmp_path / "c") as wired:
        driver = wired.bench.drivers[TRANSMIT]
        with wired.client() as client:
            sent = 0
            while driver.free:
                memory.memory.write(BIG[0], bytes([sent // piece & 0xFF]) * piece)
                driver.offer([Buffer(BIG[0], piece, False)])
                started = time.monotonic()
                wired.bench.ring_bell(TRANSMIT)
                assert time.monotonic() - started < 1.0
                done = len(driver.collect())
                sent += piece * done
                if not done:
                    break
                assert sent <= (1 << 20) + 8 * piece  # what the writer holds, and the kernel's buffer
            stuck = sent
            got = 0
            while got < stuck:
                got += len(client.recv(piece))
            wired.until(driver.collect)  # the gate opened, and rang


def test_input_waits_for_buffers_and_a_new_client_follows_the_old(tmp_path: Path) -> None:
    with ram(*REGIONS) as memory, Wired(memory, tmp_path / "c") as wired:
        driver = wired.bench.drivers[RECEIVE]
        with wired.client() as client:
            client.sendall(b"early ")
            for _ in range(5):
                wired.loop.run_once(0.01)
            driver.offer([Buffer(DATA, 64, True)])
            wired.bench.ring_bell(RECEIVE)
            wired.until(lambda: driver.used_idx != memory.memory.read_uint(driver.used + 2, 2))
            assert driver.collect()[0][1] == 6 and memory.memory.read(DATA, 6) == b"early "
        for _ in range(3):
            wired.loop.run_once(0.05)
        with wired.client() as client:
            driver.offer([Buffer(DATA, 64, True)])
            client.sendall(b"again")
            wired.until(lambda: driver.used_idx != memory.memory.read_uint(driver.used + 2, 2))
            assert driver.collect()[0][1] == 5
            memory.memory.write(DATA, b"answer")
            wired.bench.drivers[TRANSMIT].offer([Buffer(DATA, 6, False)])
            wired.bench.ring_bell(TRANSMIT)
            assert client.recv(100) == b"answer"


def test_a_path_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    loop = EventLoop()
    machine: Any = SimpleNamespace(loop=loop, vm=SimpleNamespace(native=None))
    try:
        with pytest.raises(ConfigError, match=r"^--virtconsole unix:/nowhere/c: No such file"):
            make_device(machine, ConsoleConfig(path="/nowhere/c"))
        with pytest.raises(ConfigError, match=r"^--vsock 3,unix:/nowhere/v: No such file"):
            make_device(machine, VsockConfig(cid=3, path="/nowhere/v"))
    finally:
        loop.close()
    with pytest.raises(ConfigError, match="at most 96 bytes"):
        VsockConfig(cid=3, path=str(tmp_path / ("x" * 100)))
    VsockConfig(cid=3, path="x" * 96)
