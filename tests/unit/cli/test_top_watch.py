"""Who is watched by ``pyvmm top``, without a machine: names that come and go, a folder that is locked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.cli import top_watch
from pyvmm.cli.top_screen import closer
from pyvmm.cli.top_watch import COLUMNS, Seen, Watch, row
from pyvmm.errors import ConfigError
from pyvmm.qmp import control
from pyvmm.qmp.sampling import Sample


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(top_watch, "ANSWER", 0.5)
    made = tmp_path / "pyvmm"
    made.mkdir(mode=0o700)
    return made


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_machines_that_come_and_go(folder: Path) -> None:
    with Watch([], 0.1) as watch:
        assert watch.look() == []
        with socket.socket(socket.AF_UNIX) as silent:  # takes connections, says nothing
            silent.bind(str(folder / "silent.sock"))
            silent.listen(8)
            until(lambda: [each.name for each in watch.look()] == ["silent"])
            until(lambda: (seen := watch.look()) and seen[0].problem)
            assert row(watch.look()[0])[:2] == ("silent", "not answering")
        until(lambda: watch.look() == [])
    assert not [one for one in threading.enumerate() if one.name == "top"]
    with pytest.raises(ConfigError, match="no machine 'silent'"):
        Watch(["silent"], 1.0)


def test_one_that_is_no_machine(folder: Path) -> None:
    def greet(listener: socket.socket) -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            with link, contextlib.suppress(OSError):
                link.sendall(b'{"QMP": []}\n{"id": 1, "return": {}}\n{"id": 2, "return": [[]]}\n')

    with socket.socket(socket.AF_UNIX) as odd:
        odd.bind(str(folder / "odd.sock"))
        odd.listen(8)
        thread = threading.Thread(target=greet, args=(odd,))
        thread.start()
        try:
            with Watch(["odd"], 0.1) as watch:
                until(lambda: (seen := watch.look()) and "does not answer as a machine" in str(seen[0].problem))
        finally:
            odd.shutdown(socket.SHUT_RDWR)
            thread.join(5)
    assert not thread.is_alive()


def test_a_locked_folder_keeps_nobody_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_LOCK_DEADLINE", 0.2)
    with Watch([], 0.1) as watch:
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            until(lambda: watch.problem)
            began = time.monotonic()
            assert watch.look() == [] and time.monotonic() - began < 0.1
            assert "stays locked" in str(watch.problem)
        finally:
            os.close(lock)
        until(lambda: watch.problem is None)


def test_a_protected_machine_before_its_first_checkpoint() -> None:
    colo = {"mode": "primary", "x-pair": "p", "x-term": 1, "x-epoch": 0}
    one = Sample(1.0, "vm", "running", 1 << 20, [], [], None, None, None, colo, {"checkpoints": 1, "pages": 0})
    seen = Seen("vm", one)
    assert len(row(seen)) == len(COLUMNS) and row(seen)[COLUMNS.index("PAUSE")] == ""
    assert closer(seen)[-1] == "checkpoints: 1, the last 0 pages"
