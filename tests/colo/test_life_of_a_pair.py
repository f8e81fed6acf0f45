"""What happens to a protected guest besides death: reset, stopped by hand, strangers, TLS, refusals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.colo.test_pair import MODES, kill, more_rounds
from tests.framework.migrating import free_port
from tests.framework.pairs import (
    check_contiguous,
    check_goes_on,
    colo_stats,
    colo_status,
    pairs,
    rounds_in,
    wait_alone,
    wait_protected,
)
from tests.framework.processes import pyvmm, refused

GUEST = ("run", "guests/dirtier")


@pytest.mark.parametrize("mode", MODES)
def test_a_guest_that_is_reset_stays_protected(tmp_path: Path, mode: str) -> None:
    with pairs(tmp_path) as pair:
        primary, secondary = pair.start(*MODES[mode])
        more_rounds(primary)
        seen = len(primary.output)
        primary.qmp.execute("system_reset")
        while b"for ever" not in primary.output[seen:]:
            more_rounds(primary, 1)
        wait_protected(primary, epoch=int(colo_status(primary)["x-epoch"]) + 3)
        kill(primary)
        wait_alone(secondary)
        more_rounds(secondary)
        check_contiguous(rounds_in(secondary.quit()))


def test_stopped_by_hand_it_stands_still_on_both_sides(tmp_path: Path) -> None:
    with pairs(tmp_path) as pair:
        primary, secondary = pair.start(*MODES["hybrid"])
        primary.qmp.execute("stop")
        epoch = int(colo_status(primary)["x-epoch"])
        wait_protected(primary, epoch=epoch + 3)  # checkpoints go on
        assert primary.status() == "paused"
        assert secondary.status() == "colo"
        epoch = int(colo_status(primary)["x-epoch"])
        primary.qmp.execute("cont")
        wait_protected(primary, epoch=epoch + 2)
        kill(primary)
        wait_alone(secondary)
        more_rounds(secondary)
        secondary.quit()


def test_stopped_and_let_run_again_and_again(tmp_path: Path) -> None:
    """At whatever moment of a checkpoint: it stays a pair, and both stand still when it is stopped."""
    with pairs(tmp_path) as pair:
        primary, secondary = pair.start("--checkpoint-delay", "5")
        for _ in range(60):
            primary.qmp.execute("stop")
            primary.qmp.execute("cont")
        assert colo_status(primary)["mode"] == "primary", colo_status(primary)
        more_rounds(primary)
        primary.qmp.execute("stop")
        wait_protected(primary, int(colo_status(primary)["x-epoch"]) + 3)
        assert primary.status() == "paused"
        assert not rounds_in(secondary.output)
        primary.quit()
        secondary.wait_for("paused")
        secondary.quit()


def test_the_replica_is_not_let_run_by_hand_and_does_not_end_the_pair(tmp_path: Path) -> None:
    with pairs(tmp_path) as pair:
        primary, secondary = pair.start(*MODES["periodic"])
        with pytest.raises(Exception, match="replica"):
            secondary.qmp.execute("cont")
        with pytest.raises(Exception, match="only the primary"):
            secondary.qmp.execute("colo-checkpoint-now")
        with pytest.raises(Exception, match="protected already"):
            primary.qmp.execute("x-colo-protect", {"uri": pair.uri_of("nobody")})
        more_rounds(primary)
        primary.quit()  # the process, not the guest: that lives on
        wait_alone(secondary)
        more_rounds(secondary)
        secondary.quit()


def test_a_guest_that_is_not_to_be_protected_any_more(tmp_path: Path) -> None:
    with pairs(tmp_path) as pair:
        primary, secondary = pair.start(*MODES["periodic"])
        primary.qmp.execute("migrate_cancel")
        wait_alone(primary)
        assert secondary.end()[0] == 125
        more_rounds(primary)
        check_contiguous(rounds_in(primary.quit()))


def test_a_third_one_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    with pairs(tmp_path) as pair:
        primary, secondary = pair.start(*MODES["periodic"])
        stranger = pair.primary(secondary, "--colo-mode", "periodic")
        deadline = time.monotonic() + 30
        while "error-desc" not in stranger.migration():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        more_rounds(stranger)  # its own guest goes on
        stranger.quit()
        epoch = int(colo_status(primary)["x-epoch"])
        wait_protected(primary, epoch + 3)
        primary.quit()
        wait_alone(secondary)
        secondary.quit()


def test_over_tls_and_only_with_the_right_certificates(tmp_path: Path) -> None:
    done = pyvmm("certs", str(tmp_path / "pki"), "--host", "127.0.0.1")
    assert done.returncode == 0, done.stderr
    other = pyvmm("certs", str(tmp_path / "others"), "--host", "127.0.0.1")
    assert other.returncode == 0, other.stderr
    uri = f"tcp:127.0.0.1:{free_port()}"
    with pairs(tmp_path) as pair:
        secondary = pair.secondary("--tls-creds", str(tmp_path / "pki"), uri=uri)
        primary = pair.primary(uri, *MODES["periodic"], "--tls-creds", str(tmp_path / "pki"))
        wait_protected(primary, 3)
        with pytest.raises(ConnectionRefusedError):  # while it is a pair nobody else is listened to
            socket.create_connection(("127.0.0.1", int(uri.rpartition(":")[2])), 10)
        kill(primary)
        wait_alone(secondary)
        secondary.quit()
    with pairs(tmp_path, arbiter=f"file:{tmp_path}/second") as pair:
        waits = pair.secondary("--tls-creds", str(tmp_path / "pki"), uri=uri)
        stranger = pair.primary(uri, "--tls-creds", str(tmp_path / "others"))
        deadline = time.monotonic() + 30
        while "error-desc" not in stranger.migration():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        more_rounds(stranger)
        stranger.quit()
        assert waits.end()[0] == 125


def test_the_arbiter_is_away_and_comes_back(tmp_path: Path) -> None:
    """Held: what the survivor would say. Lost: nothing."""
    folder = tmp_path / "shared"
    folder.mkdir()
    with pairs(tmp_path, arbiter=f"file:{folder}/register") as pair:
        primary, secondary = pair.start(*MODES["periodic"])
        (lock,) = folder.glob("*.lock")
        with subprocess.Popen(["flock", str(lock), "sleep", "60"], start_new_session=True) as holder:
            try:
                time.sleep(0.2)
                said = rounds_in(kill(primary))
                time.sleep(1.5)
                assert colo_status(secondary)["mode"] == "secondary"
                assert colo_status(secondary)["x-failover"] == "active"
            finally:
                os.killpg(holder.pid, signal.SIGKILL)
        wait_alone(secondary)
        more_rounds(secondary)
        check_goes_on(said, rounds_in(secondary.quit()))


def test_failover_by_hand_waits_for_the_word(tmp_path: Path) -> None:
    with pairs(tmp_path) as pair:
        secondary = pair.secondary("--failover", "manual")
        primary = pair.primary(secondary, *MODES["periodic"])
        wait_protected(primary, 3)
        kill(primary)
        time.sleep(1.0)
        assert colo_status(secondary)["mode"] == "secondary"
        secondary.qmp.execute("x-colo-lost-heartbeat")
        assert wait_alone(secondary)["last-mode"] == "secondary"
        more_rounds(secondary)
        assert colo_stats(secondary)["failovers"] == 1
        secondary.quit()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--colo", "primary"), "--arbiter"),
        (("--arbiter", "none"), "goes with --colo"),
        (("--colo", "secondary", "--arbiter", "none"), "--incoming"),
        (("--colo", "primary", "--arbiter", "none", "--incoming", "unix:/tmp/x"), "--incoming is for the secondary"),
        (("--colo", "primary", "--arbiter", "paper"), "etcd:HOST:PORT"),
        (("--colo", "primary", "--arbiter", "none", "--peer", "tcp:127.0.0.1:4"), "--insecure"),
        (("--colo", "primary", "--arbiter", "none", "--peer", "fd:4"), "several connections"),
        (("--colo", "primary", "--arbiter", "none", "--colo-pair", "a b"), "letters, digits"),
        (("--colo", "primary", "--arbiter", "none", "--heartbeat-loss", "1"), "2 to 1000"),
        (("--colo", "primary", "--arbiter", "none", "--balloon", "on"), "balloon"),
        (("--colo", "primary", "--arbiter", "none", "--colo-record", "/nowhere/x"), "--colo-record"),
        (("--colo", "primary", "--arbiter", "none", "--metrics", "nowhere"), "HOST:PORT"),
        (("--colo", "primary", "--arbiter", "none", "--metrics", "192.0.2.1:9"), "--metrics"),
    ],
)
def test_what_cannot_be(words: tuple[str, ...], said: str) -> None:
    assert said in refused(*GUEST, *words)
