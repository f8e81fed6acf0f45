"""Trace events of a running machine, switched by a client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.qmp.client import CommandError
from tests.framework.real_mode import COUNT_FOREVER
from tests.qmp.conftest import QmpMachine

Start = Callable[..., QmpMachine]


def test_events_are_listed_switched_and_go_to_stderr(machine_with_qmp: Start) -> None:
    machine = machine_with_qmp(COUNT_FOREVER)
    with machine.client() as client:
        event = {"name": "run_state_change", "state": "disabled", "vcpu": False}
        assert client.execute("trace-event-get-state", {"name": "run_state_change"}) == [event]
        everything = client.execute("trace-event-get-state", {"name": "*"})
        assert event in everything and len(everything) > 30
        assert [e["name"] for e in everything] == sorted(e["name"] for e in everything)
        assert client.execute("trace-event-get-state", {"name": "no-such*"}) == []
        with pytest.raises(CommandError, match=r'^unknown event "no-such"$'):
            client.execute("trace-event-get-state", {"name": "no-such"})
        client.execute("trace-event-set-state", {"name": "run_state*", "enable": True})
        assert client.execute("trace-event-get-state", {"name": "run_state_change"})[0]["state"] == "enabled"
        client.execute("stop")
        client.execute("trace-event-set-state", {"name": "run_state_change", "enable": False})
        client.execute("cont")
        client.execute("trace-event-set-state", {"name": "no-such*", "enable": True})
        client.execute("quit")
    _, _, err = machine.running.finish()
    assert b"run_state_change running -> paused" in err
    assert b"paused -> running" not in err


def test_they_join_the_file_of_the_command_line(machine_with_qmp: Start, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    machine = machine_with_qmp(COUNT_FOREVER, "--trace", f"machine_ended,file={trace},format=log")
    with machine.client() as client:
        states = {e["name"]: e["state"] for e in client.execute("trace-event-get-state", {"name": "*"})}
        assert (states["machine_ended"], states["run_state_change"]) == ("enabled", "disabled")
        for _ in range(50):  # however often
            client.execute("trace-event-set-state", {"name": "run_state_change", "enable": True})
        client.execute("stop")
        client.execute("quit")
    assert machine.running.finish()[2] == b""
    text = trace.read_text()
    assert text.count("running -> paused") == 1 and "machine_ended" in text


@pytest.mark.parametrize("name", ["qmp_connect", "qmp_command", "qmp_answer", "qmp_event", "qmp_disconnect"])
def test_the_monitors_own_events(machine_with_qmp: Start, tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    machine = machine_with_qmp(COUNT_FOREVER, "--trace", f"{name},file={trace},format=log")
    for command in ("stop", "quit"):
        with machine.client() as client:
            client.execute(command)
    machine.running.finish()
    assert name in trace.read_text()
