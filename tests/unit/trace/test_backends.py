"""What each backend writes, how it ends, and that it never stops what it watches."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pyvmm.errors import ConfigError
from pyvmm.trace.backends import Backend, LogBackend, LogFileBackend, SimpleBackend
from pyvmm.trace.chrome import ChromeBackend
from pyvmm.trace.events import Event, group_events, trace_group


@pytest.fixture
def net(package: Path) -> dict[str, Event]:
    return group_events(trace_group("net"))


def objects(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_bytes()))


def test_log_line(net: dict[str, Event]) -> None:
    stream = io.StringIO()
    LogBackend(stream).record(net["net_send"], (3, 0x1000, "eth\n\x1b[31m"))
    pattern = r"\d\d:\d\d:\d\d\.\d{6} \[MainThread\] net_send queue 3 gpa 0x1000 eth\\n\\x1b\[31m\n"
    assert re.fullmatch(pattern, stream.getvalue())


def test_simple_file_has_one_line_an_event(net: dict[str, Event], tmp_path: Path) -> None:
    backend = SimpleBackend(str(tmp_path / "t"))
    backend.record(net["net_poll_begin"], ())
    backend.record(net["net_send"], (1, 2, "a\tb\nc\ud800"))
    head, first, second = (tmp_path / "t").read_text().splitlines()
    assert head == "# ns\ttid\tgroup\tevent\ttext"
    assert first.split("\t")[1:] == [str(threading.get_native_id()), "net", "net_poll_begin", "polling"]
    assert second.split("\t")[4] == r"queue 1 gpa 0x2 a\tb\nc\ud800"
    assert int(first.split("\t")[0]) <= int(second.split("\t")[0])


def test_values_that_do_not_fit_are_shown_and_do_not_raise(net: dict[str, Event], tmp_path: Path) -> None:
    stream = io.StringIO()
    for values in ((), (1,), ("x", None, 3), (1, 2, 3, 4)):
        LogBackend(stream).record(net["net_send"], values)
        ChromeBackend(str(tmp_path / "c")).record(net["net_send"], values)
    assert stream.getvalue().count("does not fit") == 4


class Lost(io.StringIO):
    """A stream whose other end is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_backend_that_cannot_write_says_so_once(net: dict[str, Event], capsys: pytest.CaptureFixture[str]) -> None:
    backend = LogBackend(Lost())
    for _ in range(3):
        backend.record(net["net_poll_begin"], ())
    assert capsys.readouterr().err.count("tracing stopped") == 1


def test_a_full_disk_stops_the_trace_only(net: dict[str, Event], capsys: pytest.CaptureFixture[str]) -> None:
    backend = LogFileBackend("/dev/full")
    for _ in range(3):
        backend.record(net["net_poll_begin"], ())
    assert capsys.readouterr().err.count("No space left") == 1


def test_a_disk_that_is_full_from_the_start_is_a_bad_option(net: dict[str, Event]) -> None:
    with pytest.raises(ConfigError, match="/dev/full: No space left"):
        SimpleBackend("/dev/full")


@pytest.mark.parametrize("kind", [LogFileBackend, SimpleBackend, ChromeBackend])
def test_a_file_stops_growing_at_its_limit(
    net: dict[str, Event], tmp_path: Path, kind: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t"
    backend: Backend = kind(str(path), limit=2000)
    for _ in range(200):
        backend.record(net["net_send"], (1, 2, "x" * 20))
    assert 1000 < path.stat().st_size <= 2000 + len("\n]\n")
    assert capsys.readouterr().err.count("has reached its limit") == 1
    assert backend.closed
    if kind is ChromeBackend:
        objects(path)


def test_chrome_has_the_fields_that_perfetto_needs(net: dict[str, Event], tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    backend = ChromeBackend(str(path))
    assert len(objects(path)) == 1, "valid before the first event"

    def vcpu() -> None:
        backend.record(net["net_poll_begin"], ())
        backend.record(net["net_send"], (-1, (1 << 64) - 1, 'quo"te\ud800'))
        backend.record(net["net_poll_end"], (1 << 60,))

    for name in ("vcpu0", "vcpu1"):
        thread = threading.Thread(target=vcpu, name=name)
        thread.start()
        thread.join(10)
    trace = objects(path)
    assert all({"name", "ph", "ts", "pid", "tid"} <= event.keys() for event in trace)
    assert all(event["pid"] == os.getpid() for event in trace)
    assert {e["args"]["name"] for e in trace if e["ph"] == "M"} == {"pyvmm", "vcpu0", "vcpu1"}
    begin, instant, end = (e for e in trace if e["ph"] != "M" and e["tid"] == trace[-1]["tid"])
    assert (begin["ph"], begin["name"], begin["cat"]) == ("B", "net_poll", "net")
    assert (instant["ph"], instant["s"]) == ("i", "t")
    assert instant["args"] == {"queue": -1, "gpa": "0xffffffffffffffff", "name": 'quo"te\\ud800'}
    assert (end["ph"], end["name"]) == ("E", "net_poll")
    assert end["args"] == {"packets": hex(1 << 60)}, "JavaScript would round the number"
    assert begin["ts"] <= instant["ts"] <= end["ts"]


CHILD = """
import os, signal, sys, threading
from pyvmm.trace import control, events
from pathlib import Path
events.PACKAGE = Path(sys.argv[1])
control.enable_from_option(f"net_*,file={sys.argv[2]},format=chrome")
T = events.trace_group("net")
for number in range(int(sys.argv[4])):
    T.net_send(number, 0, "before the end")
os.kill(os.getpid(), int(sys.argv[3]))
threading.Event().wait(30)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_chrome_is_valid_json_however_the_process_ends(package: Path, tmp_path: Path, number: int) -> None:
    path = tmp_path / "t.json"
    arguments = [str(package), str(path), str(int(number)), "50"]
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, timeout=60, check=False)
    assert done.returncode != 0
    assert sum(e["name"] == "net_send" for e in objects(path)) == 50


def test_a_trace_into_a_pipe_has_no_bracket_to_take_back(net: dict[str, Event], tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        backend = ChromeBackend(str(fifo))
        backend.record(net["net_poll_begin"], ())
        backend.close()
        assert len(json.loads(os.read(reader, 65536) + b"]")) == 3
    finally:
        os.close(reader)


def test_a_signal_handler_may_trace_while_a_trace_is_written(net: dict[str, Event]) -> None:
    """The handler runs on the thread that holds the backend's lock."""

    class Nested(io.StringIO):
        depth = 0

        def write(self, text: str) -> int:
            if self.depth == 0:
                self.depth = 1
                backend.record(net["net_poll_begin"], ())
            return super().write(text)

    stream = Nested()
    backend = LogBackend(stream)
    backend.record(net["net_send"], (1, 2, "outer"))
    assert len(stream.getvalue().splitlines()) == 2
