"""Migrations that go wrong: whatever happens, the guest runs in one place, or in none where that is documented."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.framework.migrating import DIRTIER, CommandError, Side, check_rounds, dirtier, free_port
from tests.framework.processes import pyvmm, refused

Start = Callable[..., Side]
PAGES = 600


def pair(start: Start, folder: Path, *, rounds: int = 40, name: str = "") -> tuple[Side, Side]:
    """A source whose guest runs, and a destination that waits at ``folder/m``."""
    guest = dirtier(PAGES, 50, rounds)
    to = start(f"to{name}", *guest, "--incoming", f"unix:{folder}/m{name}")
    source = start(f"from{name}", *guest)
    source.wait_for_text(b"round 2:")
    to.wait_for("inmigrate")
    return source, to


def goes_on(source: Side, rounds: int = 40) -> None:
    """The source's guest ends there, as if nothing had happened."""
    status, output, problems = source.end()
    assert (status, problems) == (0, "")
    check_rounds(output, PAGES, rounds)


def test_a_cancelled_migration(start: Start, tmp_path: Path) -> None:
    source, to = pair(start, tmp_path)
    source.migrate(f"unix:{tmp_path}/m", max_bandwidth=1_000_000, downtime_limit=1)
    deadline = time.monotonic() + 20
    while not source.migration().get("ram", {}).get("transferred"):
        assert time.monotonic() < deadline
    with pytest.raises(CommandError, match="There's a migration process in progress"):
        source.migrate(f"unix:{tmp_path}/m")
    with pytest.raises(CommandError, match="There's a migration process in progress"):
        source.qmp.execute("snapshot-save", {"tag": str(tmp_path / "snapshot")})
    with pytest.raises(CommandError, match="There's a migration process in progress"):
        source.capabilities(events=True)
    source.qmp.execute("migrate_cancel")
    assert source.migrated(10)["status"] == "cancelled"
    status, output, problems = to.end()
    assert (status, output) == (125, b"")
    assert problems == "pyvmm: incoming migration failed: the peer closed the connection\n"
    goes_on(source)


def test_a_second_attempt_after_a_failure(start: Start, tmp_path: Path) -> None:
    source, to = pair(start, tmp_path)
    source.migrate(f"unix:{tmp_path}/nowhere")
    info = source.migrated()
    assert (info["status"], source.status()) == ("failed", "running")
    assert "nowhere: No such file or directory" in info["error-desc"]
    source.migrate(f"unix:{tmp_path}/m")
    assert source.migrated()["status"] == "completed"
    begin = source.quit()
    status, rest, _ = to.end()
    assert status == 0
    check_rounds(begin + rest, PAGES, 40)


@pytest.mark.parametrize("seed", range(4))
def test_a_destination_that_is_killed(start: Start, tmp_path: Path, seed: int) -> None:
    """Until it was handed the guest the source goes on; a guest that was handed over is nowhere, and that is said."""
    source, to = pair(start, tmp_path)
    chance = random.Random(seed)
    source.migrate(f"unix:{tmp_path}/m", max_bandwidth=chance.choice([0, 20_000_000]))
    time.sleep(chance.uniform(0, 0.15))
    to.process.kill()
    info = source.migrated(20)
    if info["status"] == "failed" and "handed over" not in info["error-desc"]:
        goes_on(source)
    else:
        assert source.status() in ("paused", "postmigrate")
        source.quit()


@pytest.mark.parametrize("seed", range(4))
def test_a_source_that_is_killed(start: Start, tmp_path: Path, seed: int) -> None:
    """The destination has all of the guest, and runs it to its end, or it ends with an error; never half of it."""
    source, to = pair(start, tmp_path, rounds=30)
    chance = random.Random(seed)
    source.migrate(f"unix:{tmp_path}/m", max_bandwidth=chance.choice([0, 20_000_000]))
    time.sleep(chance.uniform(0, 0.15))
    os.kill(source.process.pid, signal.SIGKILL)
    status, output, problems = to.end()
    if status == 0:
        assert output.endswith(b"round 30: %d pages in " % PAGES + output.rpartition(b" pages in ")[2])
    else:
        assert (status, output) == (125, b"")
        assert problems.startswith("pyvmm: incoming migration failed: ") and problems.count("\n") == 1


def test_a_destination_that_stops_answering_is_given_up(start: Start, tmp_path: Path) -> None:
    source, to = pair(start, tmp_path)
    os.kill(to.process.pid, signal.SIGSTOP)
    try:
        source.migrate(f"unix:{tmp_path}/m", x_stall_timeout=500)
        info = source.migrated(20)
    finally:
        os.kill(to.process.pid, signal.SIGCONT)
    assert info["status"] == "failed"
    assert "for 0.5 s" in info["error-desc"]
    assert to.end()[0] == 125
    goes_on(source)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--memory", "48M"], "memory"),
        (["--smp", "2"], "cpu"),
        (["--rng"], "rng"),
        (["--memory", "48M", "--smp", "2", "--rng"], ","),
    ],
)
def test_another_machine_is_refused_with_the_differences(
    start: Start, tmp_path: Path, options: list[str], complaint: str
) -> None:
    to = start("to", str(DIRTIER), "--incoming", f"unix:{tmp_path}/m", *options)
    source = start("from", *dirtier(PAGES, 50, 20))
    source.wait_for_text(b"round 2:")
    to.wait_for("inmigrate")
    done = pyvmm("migrate", "from", f"unix:{tmp_path}/m")
    assert done.returncode == 125
    text = done.stderr.decode()
    assert "another one" in text and complaint in text.lower() and text.count("\n") == 1, text
    status, output, problems = to.end()
    assert (status, output) == (125, b"")
    assert complaint in problems.lower() and problems.count("\n") == 1
    goes_on(source, 20)


def test_only_one_connection_is_taken(start: Start, tmp_path: Path) -> None:
    port = free_port()
    guest = dirtier(PAGES, 50, 20)
    to = start("to", *guest, "--incoming", f"tcp:127.0.0.1:{port}")
    first, second = start("first", *guest), start("second", *guest)
    first.wait_for_text(b"round 2:")
    second.wait_for_text(b"round 2:")
    to.wait_for("inmigrate")
    first.migrate(f"tcp:127.0.0.1:{port}", max_bandwidth=4_000_000, downtime_limit=1)
    deadline = time.monotonic() + 20
    while not first.migration().get("ram", {}).get("transferred"):
        assert time.monotonic() < deadline
    second.migrate(f"tcp:127.0.0.1:{port}")
    assert second.migrated()["status"] == "failed"
    first.qmp.execute("migrate-set-parameters", {"max-bandwidth": 0, "downtime-limit": 300})
    assert first.migrated()["status"] == "completed"
    goes_on(second, 20)
    begin = first.quit()
    status, rest, _ = to.end()
    assert status == 0
    check_rounds(begin + rest, PAGES, 20)


def test_a_stranger_who_connects_costs_the_destination_only(start: Start, tmp_path: Path) -> None:
    port = free_port()
    to = start("to", str(DIRTIER), "--incoming", f"tcp:127.0.0.1:{port}")
    to.wait_for("inmigrate")
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(100))
        status, output, problems = to.end()
    assert (status, output) == (125, b"")
    assert problems.startswith("pyvmm: incoming migration failed: ") and problems.count("\n") == 1


def test_tls_lets_only_its_own_in(start: Start, tmp_path: Path) -> None:
    for name in ("one", "other"):
        assert pyvmm("certs", str(tmp_path / name), "--host", "127.0.0.1").returncode == 0
    guest = dirtier(PAGES, 50, 20)
    port = free_port()
    to = start("to", *guest, "--incoming", f"tcp:127.0.0.1:{port}", "--tls-creds", str(tmp_path / "one"))
    source = start("from", *guest)
    source.wait_for_text(b"round 2:")
    to.wait_for("inmigrate")
    source.migrate(f"tcp:127.0.0.1:{port}", tls_creds=str(tmp_path / "other"))
    info = source.migrated()
    assert info["status"] == "failed" and "TLS" in info["error-desc"]
    assert to.end()[0] == 125
    goes_on(source, 20)


def test_the_guest_ends_on_the_way(start: Start, tmp_path: Path) -> None:
    source, to = pair(start, tmp_path, rounds=30)
    source.migrate(f"unix:{tmp_path}/m", max_bandwidth=500_000, downtime_limit=1)
    goes_on(source, 30)
    assert to.end()[0] == 125


def test_a_guest_that_has_ended_is_not_migrated(start: Start, tmp_path: Path) -> None:
    source = start("from", *dirtier(PAGES, 50, 2), "--no-shutdown")
    source.wait_for("shutdown")
    with pytest.raises(CommandError, match="the guest has ended"):
        source.migrate(f"unix:{tmp_path}/m")
    source.quit()


def test_what_cannot_be_an_incoming_is_said_before_anything_starts(tmp_path: Path) -> None:
    for uri in ("exec:cat", "tcp:nowhere", "fd:x"):
        assert "--incoming" in refused("run", str(DIRTIER), "--incoming", uri)
    assert "--tls-creds goes with --incoming" in refused("run", str(DIRTIER), "--tls-creds", str(tmp_path))
    (tmp_path / "file").write_text("precious")
    assert "not a socket" in refused("run", str(DIRTIER), "--incoming", f"unix:{tmp_path}/file")
    assert "excludes --exec" in refused("linux", "--incoming", "defer", "--exec", "true")
    assert "no running machine" in refused("migrate", "nobody", f"unix:{tmp_path}/m")
