"""Clients of a protected guest: they hear it whichever of the two answers, and only what both know of.

guests/net-echo has no state that a client could see but its counters; what is sent through COLO's filters, and what
is not, is what this is about.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.colo.test_pair import MODES, kill
from tests.framework.echo_client import GUEST, MAC, echo_client, echoed
from tests.framework.net_commands import demo_host
from tests.framework.pairs import PATIENT, colo_stats, pairs, wait_alone, wait_protected
from tests.framework.processes import REPOSITORY, refused
from tests.framework.topology import Namespace

pytestmark = [pytest.mark.net, pytest.mark.timeout(120)]
ECHO = (str(REPOSITORY / "guests" / "net-echo"), "--append", f"ip={GUEST}", "--net", f"demo,mac={MAC}")


@pytest.fixture
def host() -> Iterator[Namespace]:
    with demo_host() as space:
        yield space


@pytest.fixture
def client(host: Namespace) -> Iterator[socket.socket]:
    with echo_client(host, 0.2) as made:
        yield made


@pytest.mark.parametrize("mode", MODES)
def test_a_client_goes_on_when_the_primary_is_killed(
    tmp_path: Path, host: Namespace, client: socket.socket, mode: str
) -> None:
    with pairs(tmp_path, ECHO) as pair:
        primary, secondary = pair.start(*MODES[mode], inside=host)
        for number in range(50):
            echoed(client, b"before %d" % number)
        (card,) = colo_stats(primary)["cards"]
        by = "released" if mode == "hybrid" else "committed"
        assert card["released"] + card["committed"] >= 50 and card[by] >= 40  # a checkpoint may take some with it
        assert bool(card["secondary-frames"]) == (mode == "hybrid")
        kill(primary)
        wait_alone(secondary)
        for number in range(50):
            echoed(client, b"after %d" % number)
        secondary.quit()


@pytest.mark.parametrize("mode", MODES)
def test_a_client_goes_on_when_the_secondary_is_killed_and_with_the_next_one(
    tmp_path: Path, host: Namespace, client: socket.socket, mode: str
) -> None:
    with pairs(tmp_path, ECHO) as pair:
        primary, secondary = pair.start(*MODES[mode], inside=host)
        echoed(client, b"before")
        kill(secondary)
        wait_alone(primary)
        for number in range(20):
            echoed(client, b"alone %d" % number, seconds=1)
        another = pair.secondary(*PATIENT, inside=host)
        primary.qmp.execute("x-colo-protect", {"uri": pair.uri_of(another.name)})
        wait_protected(primary)
        echoed(client, b"again")
        kill(primary)
        wait_alone(another)
        echoed(client, b"once more")
        # The survivor's cards have a rewriter, and the next ones get its records.
        third = pair.secondary(*PATIENT, inside=host)
        another.qmp.execute("x-colo-protect", {"uri": pair.uri_of(third.name)})
        wait_protected(another)
        for number in range(20):
            echoed(client, b"twice protected %d" % number)
        kill(another)
        wait_alone(third)
        echoed(client, b"for ever")
        third.quit()


def test_a_stream_cannot_be_protected(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        backend = f"stream:unix:{tmp_path}/s"
        assert "use a tap" in refused("run", ECHO[0], "--net", backend, "--colo", "primary", "--arbiter", "none")
