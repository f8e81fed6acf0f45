"""One of two that claim wins, whatever is slow, stopped, restarted or lost: on a real etcd and on files."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.colo.arbiter import Arbiter, ArbiterAway, NoArbiter, Ownership, Register, arbiter_from, decode_register
from pyvmm.errors import ConfigError, HostError, StateError
from tests.framework.etcd import Etcd, etcd_server

IN_TIME = 5.0


@pytest.fixture(scope="module", autouse=True)
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    with etcd_server(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(params=["etcd", "file"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file:{tmp_path}/register"
    server: Etcd = request.getfixturevalue("etcd")
    return f"etcd:{server.address}"


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> str:
    return f"pair-{abs(hash(request.node.nodeid))}"


def sides(where: str, pair: str) -> tuple[Ownership, Ownership]:
    return Ownership(arbiter_from(where), pair, "a"), Ownership(arbiter_from(where), pair, "b")


def test_a_life_of_a_pair(where: str, pair: str) -> None:
    a, b = sides(where, pair)
    assert a.begin_pair(IN_TIME) == b.begin_pair(IN_TIME) == 1
    assert b.claim(1, IN_TIME)
    assert b.claim(1, IN_TIME), "who asks again gets the same answer"
    assert not a.claim(1, IN_TIME) and not a.claim(1, IN_TIME)
    with pytest.raises(StateError, match="belongs to b since term 2"):
        a.begin_pair(IN_TIME)
    assert b.begin_pair(IN_TIME) == 3
    assert a.begin_pair(IN_TIME) == 3
    assert not b.claim(1, IN_TIME), "a claim of an old term"
    assert a.claim(3, IN_TIME)
    assert a.arbiter.read(pair, IN_TIME) == Register(4, "solo", "a")


def test_of_many_that_claim_at_once_one_wins(where: str, pair: str) -> None:
    claimants = [Ownership(arbiter_from(where), pair, f"vm{number}") for number in range(8)]
    term = claimants[0].begin_pair(IN_TIME)
    start = threading.Barrier(len(claimants))
    won: list[str] = []

    def claim(one: Ownership) -> None:
        start.wait(IN_TIME)
        if one.claim(term, 10.0):
            won.append(one.me)

    threads = [threading.Thread(target=claim, args=(one,)) for one in claimants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    assert len(won) == 1
    assert claimants[0].arbiter.read(pair, IN_TIME) == Register(term + 1, "solo", won[0])


class LosesAnswers:
    """An arbiter behind a bad line: what is asked is done, what is answered gets lost, ``times`` times."""

    def __init__(self, real: Arbiter, times: int) -> None:
        self.real, self.times = real, times

    def read(self, pair: str, seconds: float) -> Register | None:
        return self.real.read(pair, seconds)

    def compare_and_swap(self, pair: str, old: Register | None, new: Register, seconds: float) -> bool:
        answer = self.real.compare_and_swap(pair, old, new, seconds)
        if self.times:
            self.times -= 1
            raise ArbiterAway("the line broke")
        return answer


@pytest.mark.parametrize("times", [1, 3])
def test_a_lost_answer_is_found_by_asking_again(where: str, pair: str, times: int) -> None:
    a, b = sides(where, pair)
    a.begin_pair(IN_TIME)
    assert Ownership(LosesAnswers(a.arbiter, times), pair, "a").claim(1, IN_TIME)
    assert not Ownership(LosesAnswers(b.arbiter, times), pair, "b").claim(1, IN_TIME)


def test_an_etcd_that_hangs_is_away_and_then_answers(etcd: Etcd, pair: str) -> None:
    a, b = sides(f"etcd:{etcd.address}", pair)
    a.begin_pair(IN_TIME)
    etcd.stop()
    try:
        began = time.monotonic()
        with pytest.raises(ArbiterAway, match="does not answer"):
            a.claim(1, 0.7)
        assert time.monotonic() - began < 2.0
        timer = threading.Timer(0.8, etcd.go_on)
        timer.start()
        assert a.claim(1, IN_TIME), "it asked until there was an answer"
        timer.join(5.0)
    finally:
        etcd.go_on()
    assert not b.claim(1, IN_TIME)


def test_the_next_member_is_asked_when_one_is_gone(etcd: Etcd, pair: str) -> None:
    a = Ownership(arbiter_from(f"etcd:127.0.0.1:1,{etcd.address}"), pair, "a")
    a.begin_pair(IN_TIME)
    assert a.claim(1, IN_TIME)


def test_a_register_survives_the_end_of_etcd(tmp_path: Path) -> None:
    with etcd_server(tmp_path) as server:
        a = Ownership(arbiter_from(f"etcd:{server.address}"), "p", "a")
        a.begin_pair(IN_TIME)
        assert a.claim(1, IN_TIME)
    with pytest.raises(ArbiterAway, match="is it running"):
        a.claim(1, 0.2)
    with etcd_server(tmp_path) as server:
        assert arbiter_from(f"etcd:{server.address}").read("p", IN_TIME) == Register(2, "solo", "a")


def test_a_stopped_holder_of_the_lock_blocks_and_is_named(tmp_path: Path) -> None:
    a, b = sides(f"file:{tmp_path}/register", "p")
    a.begin_pair(IN_TIME)
    with (tmp_path / "register.p.lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ArbiterAway, match="is it stopped"):
            b.claim(1, 0.1)
    assert b.claim(1, IN_TIME)


KILLED_ANYWHERE = """
import os, signal, sys, threading
from pyvmm.colo.arbiter import arbiter_from, Register
arbiter = arbiter_from(sys.argv[1])
threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL)).start()
term = 1
while True:
    arbiter.compare_and_swap("p", arbiter.read("p", 1), Register(term, "solo", "x" * 200), 1)
    term += 1
"""


def test_a_writer_killed_anywhere_leaves_a_whole_register_and_a_free_lock(tmp_path: Path) -> None:
    where = f"file:{tmp_path}/register"
    seen = 0
    for number in range(5):
        delay = 0.05 + number * 0.013
        command = [sys.executable, "-c", KILLED_ANYWHERE, where, str(delay)]
        assert subprocess.run(command, timeout=30, check=False, env={**os.environ}).returncode == -9
        register = arbiter_from(where).read("p", IN_TIME)
        if register is not None:
            seen = register.term
            assert arbiter_from(where).compare_and_swap("p", register, Register(seen + 1, "protected"), 1.0)
    assert seen


@pytest.mark.parametrize(
    "stored",
    [b"", b"{}", b"x" * 5000, b'{"term":0,"state":"protected"}', b'{"term":1,"state":"solo"}',
     b'{"term":1,"state":"protected","owner":"a"}', b'{"term":1,"state":"mine","owner":"a"}',
     b'{"term":9223372036854775808,"state":"protected"}', b'{"term":1,"state":"protected","more":1}'],
)  # fmt: skip
def test_what_is_no_register_is_refused_by_its_place(stored: bytes, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="here: not a register"):
        decode_register(stored, "here")
    (tmp_path / "register.p").write_bytes(stored)
    with pytest.raises(HostError, match=r"register\.p: not a register"):
        Ownership(arbiter_from(f"file:{tmp_path}/register"), "p", "a").claim(1, IN_TIME)


@pytest.mark.parametrize(
    "text", ["", "etcd", "etcd:", "etcd:host", "etcd:host:0", "etcd:a:1,b", "file:", "none:x", "zk:a:1"]
)
def test_what_is_no_arbiter_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--arbiter"):
        arbiter_from(text)


def test_a_missing_folder_and_odd_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        arbiter_from(f"file:{tmp_path}/missing/register")
    for name in ("", "../x", "a/b", "a b", "x" * 64):
        with pytest.raises(ConfigError, match="COLO: the"):
            Ownership(NoArbiter(), name, "a")


def test_without_an_arbiter_both_win() -> None:
    a, b = sides("none", "p")
    assert a.claim(1, IN_TIME) and b.claim(1, IN_TIME)
