"""Migration as QMP clients see it: QEMU's own library and shell, QEMU's shapes and words."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from tests.framework.migrating import CommandError, Side, check_rounds, dirtier

Start = Callable[..., Side]
PAGES = 300
RAM = {
    "transferred", "remaining", "total", "duplicate", "skipped", "normal", "normal-bytes", "dirty-pages-rate", "mbps",
    "dirty-sync-count", "postcopy-requests", "page-size", "multifd-bytes", "pages-per-second", "precopy-bytes",
    "downtime-bytes", "postcopy-bytes",
}  # fmt: skip
"""What QEMU 7.2 tells."""


def test_the_library_drives_a_migration_and_hears_its_events(start: Start, tmp_path: Path) -> None:
    guest = dirtier(PAGES, 50, 30)
    to = start("to", *guest, "--incoming", "defer")
    source = start("from", *guest)
    source.wait_for_text(b"round 2:")
    to.wait_for("inmigrate")
    for side in (to, source):
        side.qmp.close()
        side._client = None
    info = asyncio.run(asyncio.wait_for(_drive(source.path, to.path, f"unix:{tmp_path}/m"), 60))
    assert set(info) == {"status", "ram", "total-time", "downtime", "setup-time"}
    assert set(info["ram"]) == RAM
    assert info["ram"]["page-size"] == 4096 and info["ram"]["total"] == 32 << 20
    assert info["ram"]["normal-bytes"] == 4096 * info["ram"]["normal"]
    assert 0 <= info["downtime"] <= info["total-time"]
    begin = source.quit()
    status, rest, _ = to.end()
    assert status == 0
    check_rounds(begin + rest, PAGES, 30)


async def _drive(source_path: Path, to_path: Path, uri: str) -> dict[str, Any]:
    source, to = QMPClient("source"), QMPClient("to")
    await source.connect(str(source_path))
    await to.connect(str(to_path))
    try:
        assert await source.execute("query-migrate") == {}
        for side in (source, to):
            events_on = [{"capability": "events", "state": True}]
            await side.execute("migrate-set-capabilities", {"capabilities": events_on})
        with source.listener() as there, to.listener() as here:
            await to.execute("migrate-incoming", {"uri": uri})
            await source.execute("migrate", {"uri": uri})
            statuses, passes = [], []
            while not statuses or statuses[-1] != "completed":
                event: Any = await asyncio.wait_for(there.get(), 20)
                if event["event"] == "MIGRATION":
                    statuses.append(event["data"]["status"])
                elif event["event"] == "MIGRATION_PASS":
                    passes.append(event["data"]["pass"])
                else:
                    assert event["event"] == "STOP"
            assert statuses == ["setup", "active", "device", "completed"]
            assert passes == list(range(1, len(passes) + 1)) and passes
            heard: list[Any] = []
            while "RESUME" not in heard or "completed" not in heard:
                event = await asyncio.wait_for(here.get(), 20)
                heard.append(event["data"]["status"] if event["event"] == "MIGRATION" else event["event"])
            assert [one for one in heard if one != "RESUME"] == ["setup", "active", "completed"]
        assert await to.execute("query-migrate") == {"status": "completed"}
        info: Any = await source.execute("query-migrate")
        assert isinstance(info, dict)
        return info
    finally:
        for side in (source, to):
            with contextlib.suppress(EOFError):
                await side.disconnect()


def test_qmp_shell_drives_one_by_hand(start: Start, tmp_path: Path) -> None:
    guest = dirtier(PAGES, 50, 100)
    to = start("to", *guest, "--incoming", f"unix:{tmp_path}/m")
    source = start("from", *guest)
    source.wait_for_text(b"round 2:")
    to.wait_for("inmigrate")
    source.qmp.close()
    source._client = None
    master, slave = pty.openpty()
    shell = subprocess.Popen(
        [Path(sys.executable).with_name("qmp-shell"), str(source.path)], stdin=slave, stdout=slave, stderr=slave,
        env=os.environ | {"TERM": "dumb", "HOME": str(tmp_path)},
    )  # fmt: skip
    os.close(slave)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 20
        while text not in seen:
            ready, _, _ = select.select([master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come: {seen!r}"
            seen += os.read(master, 4096).decode()
        seen = seen.partition(text)[2]

    try:
        until("(QEMU) ")
        os.write(master, b"migrate-set-parameters downtime-limit=500\n")
        until('"return": {}')
        os.write(master, f"migrate uri=unix:{tmp_path}/m\n".encode())
        until('"return": {}')
        deadline = time.monotonic() + 20
        while True:
            os.write(master, b"query-migrate\n")
            until('"status": "')
            if seen.startswith("completed"):
                break
            assert time.monotonic() < deadline
        os.write(master, b"query-status\n")
        until('"status": "postmigrate"')
        until("(QEMU) ")
        os.write(master, b"quit\n")
        until("quit")
        assert source.end()[0] == 0
    finally:
        shell.kill()
        shell.wait(10)
        os.close(master)
    to.wait_for("running")
    to.quit()


def test_parameters_and_capabilities_in_qemus_words(start: Start) -> None:
    side = start("one", *dirtier(PAGES, 50, 0), "-S")
    parameters = side.qmp.execute("query-migrate-parameters")
    assert parameters["downtime-limit"] == 300 and parameters["max-bandwidth"] == 0
    side.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30, "cpu-throttle-initial": 30})
    assert side.qmp.execute("query-migrate-parameters") == parameters | {
        "max-bandwidth": 1 << 30, "cpu-throttle-initial": 30,
    }  # fmt: skip
    for wrong, words in (
        ({"xbzrle-cache-size": 1 << 20}, "Parameter 'xbzrle-cache-size' is unexpected"),
        ({"max-bandwidth": -1}, "Parameter 'max-bandwidth' expects a number from 0 to"),
        ({"max-cpu-throttle": 100}, "Parameter 'max-cpu-throttle' expects a number from 1 to 99"),
        ({"downtime-limit": "1"}, "Invalid parameter type for 'downtime-limit', expected: integer"),
    ):
        with pytest.raises(CommandError, match=words):
            side.qmp.execute("migrate-set-parameters", wrong)
    side.capabilities(auto_converge=True, return_path=True, postcopy_ram=False)
    states = {one["capability"]: one["state"] for one in side.qmp.execute("query-migrate-capabilities")}
    assert states["auto-converge"] and states["return-path"] and not states["multifd"]
    assert len(states) == 20
    for name, state, words in (
        ("postcopy-ram", True, "cannot be turned on: there is no post-copy"),
        ("return-path", False, "cannot be turned off"),
        ("nonsense", True, "does not accept value 'nonsense'"),
    ):
        with pytest.raises(CommandError, match=words):
            side.qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": name, "state": state}]})
    for arguments, words in (
        ({"uri": "nonsense"}, "write tcp:HOST:PORT"),
        ({"uri": "fd:7"}, "File descriptor named '7' has not been found"),
        ({"uri": "unix:/x", "blk": True}, "Parameter 'blk' is not supported"),
        ({"uri": "unix:/x", "resume": True}, "Cannot resume"),
    ):
        with pytest.raises(CommandError, match=words):
            side.qmp.execute("migrate", arguments)
    with pytest.raises(CommandError, match="'-incoming' was not specified"):
        side.qmp.execute("migrate-incoming", {"uri": "unix:/x"})
    side.qmp.execute("migrate_cancel")
    side.quit()


def test_a_machine_that_waits_for_its_guest_does_nothing_else(start: Start, tmp_path: Path) -> None:
    to = start("to", *dirtier(PAGES, 50, 0), "--incoming", "defer")
    to.wait_for("inmigrate")
    for command, arguments, words in (
        ("cont", None, "waiting for an incoming migration"),
        ("system_reset", None, "not here"),
        ("migrate", {"uri": f"unix:{tmp_path}/m"}, "waiting for an incoming migration"),
        ("snapshot-save", {"tag": str(tmp_path / "x")}, "inmigrate"),
        ("calc-dirty-rate", {"calc-time": 1}, "waiting for an incoming migration"),
    ):
        with pytest.raises(CommandError, match=words):
            to.qmp.execute(command, arguments)
    to.qmp.execute("migrate-incoming", {"uri": f"unix:{tmp_path}/m"})
    with pytest.raises(CommandError, match="already been started"):
        to.qmp.execute("migrate-incoming", {"uri": f"unix:{tmp_path}/m2"})
    to.quit()
    assert not (tmp_path / "m").exists()


def test_the_dirty_rate_and_where_it_is_hot(start: Start) -> None:
    """1,000 pages again and again, from 8 MiB on; each counts once."""
    side = start("one", *dirtier(1000, 50, 0))
    side.wait_for_text(b"round 2:")
    assert side.qmp.execute("query-dirty-rate")["status"] == "unstarted"
    side.qmp.execute("calc-dirty-rate", {"calc-time": 1})
    assert side.qmp.execute("query-dirty-rate")["status"] == "measuring"
    with pytest.raises(CommandError, match="is being measured"):
        side.qmp.execute("calc-dirty-rate", {"calc-time": 1})
    deadline = time.monotonic() + 20
    while (found := side.qmp.execute("query-dirty-rate"))["status"] == "measuring":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found["mode"] == "dirty-bitmap" and found["calc-time"] == 1
    assert found["dirty-rate"] in (3, 4)  # 1,000 pages are 3.9 MiB
    hot = {one["address"]: one["pages"] for one in found["x-hottest"]}
    assert hot[8 << 20] == 512 and hot[10 << 20] == 488

    def typed(line: str) -> str:
        text: str = side.qmp.execute("human-monitor-command", {"command-line": line})
        return text

    rate = f"Dirty rate: {found['dirty-rate']} (MB/s)"
    assert typed("info dirty_rate").splitlines()[-2:] == ["Mode: dirty-bitmap", rate]
    assert "Incorrect period" in typed("calc_dirty_rate") and "Incorrect period" in typed("calc_dirty_rate 61")
    assert "Either dirty ring or dirty bitmap" in typed("calc_dirty_rate -r -b 1")
    assert "mode dirty-ring is not enabled" in typed("calc_dirty_rate -r 1")
    assert "with period 1 seconds" in typed("calc_dirty_rate -b 1")
    assert typed("info dirty_rate").splitlines()[-1] == "Dirty rate: (not ready)"
    side.quit()
