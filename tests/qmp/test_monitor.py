"""A monitor of a machine in this process: what only its insides can bring about."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pyvmm.errors import DeadlineError
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.qmp import commands
from pyvmm.qmp.client import CommandError, QmpClient, open_client
from pyvmm.qmp.commands import CommandContext, command
from pyvmm.qmp.endpoints import open_endpoint
from pyvmm.qmp.monitor import Monitor
from tests.framework.machine_story import run_with
from tests.framework.real_mode import COUNT_FOREVER, image


def tell(tmp_path: Path, story: object) -> None:
    """``story(machine, client)`` beside a machine that runs."""
    install_kick_signal()
    path = tmp_path / "qmp"
    config = MachineConfig(image=image(tmp_path, COUNT_FOREVER), serial="null", memory=4 << 20, timeout=60.0)
    endpoint = open_endpoint(f"unix:{path}")
    with build_machine(config, frozenset()) as machine, Monitor(machine, [endpoint]):

        def wrapped() -> None:
            with open_client(f"unix:{path}", 5.0) as client:
                story(machine, client)  # type: ignore[operator]

        run_with(machine, wrapped)
    endpoint.close()


def test_a_stuck_loop_still_answers_out_of_band(tmp_path: Path) -> None:
    def story(machine: object, client: QmpClient) -> None:
        assert client.execute("query-status")["running"]
        stuck, release = threading.Event(), threading.Event()

        def hold() -> None:
            stuck.set()
            release.wait(30)

        machine.loop.post(hold)  # type: ignore[attr-defined]
        assert stuck.wait(10)
        try:
            for _ in range(3):
                assert client.execute("query-status", oob=True)["running"]
            client._timeout = 0.3
            with pytest.raises(DeadlineError):
                client.execute("query-status")
            client._timeout = 5.0
            assert client.execute("query-version", oob=True)["package"].startswith("pyvmm")
        finally:
            release.set()
        assert client.execute("query-status")["running"]

    tell(tmp_path, story)


def test_a_command_with_a_defect_is_told_and_the_machine_runs_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "_commands", dict(commands.all_commands()))

    @command("x-broken")
    def broken(context: CommandContext) -> None:
        raise KeyError("a defect")

    @command("x-leaving")
    def leaving(context: CommandContext) -> None:
        """A command's own name for what is wrong."""
        context.machine.pause()
        context.machine.pause()  # a paused machine cannot become paused

    def story(machine: object, client: QmpClient) -> None:
        with pytest.raises(CommandError, match="internal error in x-broken: KeyError"):
            client.execute("x-broken")
        with pytest.raises(CommandError, match="cannot become paused"):
            client.execute("x-leaving")
        client.execute("cont")
        assert client.execute("query-status")["running"]

    tell(tmp_path, story)
    assert "QMP: internal error in x-broken" in capsys.readouterr().err
