"""Both sides of a migration, on memory without a machine: what arrives, and who has the guest when the link fails."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.errors import ChannelError, SectionError
from pyvmm.memory.guest_memory import PAGE_SIZE
from pyvmm.migration.channel import Channel, Listener
from pyvmm.migration.incoming import IncomingMigration
from pyvmm.migration.outgoing import SMALL, OutgoingMigration
from pyvmm.migration.parameters import Capabilities, MigrationStatus, Parameters
from pyvmm.migration.protocol import Message
from tests.unit.migration.fake_machines import PAGES, Loop, Machine, relay

Spoil = Callable[[int, bytes], bytes | None]


@dataclass
class Pair:
    """A source on its loop, a target, and how one migration between them went."""

    source: Machine = field(default_factory=lambda: Machine(running=True))
    target: Machine = field(default_factory=lambda: Machine(running=False))
    loop: Loop = field(default_factory=Loop)
    statuses: list[MigrationStatus] = field(default_factory=list)
    on_round: Callable[[int], None] = lambda number: None
    migration: OutgoingMigration | None = None
    destination: IncomingMigration | None = None
    far_loop: Loop = field(default_factory=Loop)
    failures: list[str] = field(default_factory=list)

    def begin(self, parameters: Parameters, capabilities: Capabilities, there: Spoil, back: Spoil) -> None:
        (a, b), (c, d) = socket.socketpair(), socket.socketpair()
        self.sockets = [b, c]
        self.relays = [relay(b, c, there), relay(c, b, back)]
        self.destination = IncomingMigration(
            Listener(f"fd:{d.detach()}"), self.target, parameters, post=self.far_loop.post, fail=self.failures.append
        )
        self.destination.start()
        self.migration = OutgoingMigration(
            self.source, f"fd:{a.detach()}", parameters, capabilities, post=self.loop.post,
            observe=self.statuses.append, observe_round=lambda number: self.on_round(number),  # noqa: PLW0108 -- set later
        )  # fmt: skip
        self.migration.start()

    def end(self) -> MigrationStatus:
        assert self.migration is not None and self.destination is not None
        self.migration.join(20)
        self.destination.join(20)
        for thread in self.relays:
            thread.join(20)
        for sock in self.sockets:
            sock.close()
        assert not self.source.dirty.active and not self.source.held
        return self.migration.status

    def run(
        self, parameters: Parameters | None = None, capabilities: Capabilities | None = None,
        there: Spoil = lambda at, data: data, back: Spoil = lambda at, data: data,
    ) -> MigrationStatus:  # fmt: skip
        self.begin(parameters or Parameters(x_stall_timeout=3000), capabilities or Capabilities(), there, back)
        return self.end()

    def same_memory(self) -> bool:
        size = PAGES * PAGE_SIZE
        return self.source.memory.read(0, size) == self.target.memory.read(0, size)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with made_pair() as made:
        yield made


@contextlib.contextmanager
def made_pair() -> Iterator[Pair]:
    made = Pair()
    made.source.memory.write(PAGE_SIZE, os.urandom(20 * PAGE_SIZE))
    try:
        yield made
    finally:
        made.loop.close()
        made.far_loop.close()
        made.source.close()
        made.target.close()


def test_a_guest_moves(pair: Pair) -> None:
    assert pair.run() is MigrationStatus.COMPLETED
    assert pair.same_memory() and pair.target.state == {"answer": 42}
    assert (pair.source.running, pair.target.running) == (False, True)
    assert (pair.source.holds_disks, pair.target.holds_disks) == (False, True)
    names = [status.value for status in pair.statuses]
    assert names == ["setup", "active", "device", "completed"]
    assert pair.migration is not None and pair.migration.downtime is not None


def test_pages_written_between_rounds_come_again(pair: Pair) -> None:
    def write(number: int) -> None:
        if number < 4:
            pair.source.memory.write(0, os.urandom(PAGES * PAGE_SIZE))

    pair.on_round = write
    limits = Parameters(downtime_limit=0, x_stall_timeout=3000)
    assert pair.run(limits) is MigrationStatus.COMPLETED
    # PAGES is what is small enough to be sent at the end anyway, so every round but the last is cut short by that.
    assert pair.same_memory()


def test_a_guest_that_was_paused_stays_so_at_the_source_when_it_fails(pair: Pair) -> None:
    pair.source.running = False
    pair.target.refuses = "another CPU"
    assert pair.run() is MigrationStatus.FAILED
    assert pair.migration is not None and "another CPU" in str(pair.migration.problem)
    assert not pair.source.running and pair.source.holds_disks


def test_a_go_that_cannot_be_sent_hands_nothing_over(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that was stopped for longer than the destination waited: nobody would have the guest."""
    send = Channel.send

    def fail(channel: Channel, kind: int, payload: bytes = b"") -> None:
        if kind == Message.GO:
            channel.close()
            raise ChannelError("the connection broke: Broken pipe")
        send(channel, kind, payload)

    monkeypatch.setattr(Channel, "send", fail)
    assert pair.run() is MigrationStatus.FAILED
    assert pair.source.running and pair.source.holds_disks and not pair.target.running
    assert pair.migration is not None and pair.migration.problem == "the connection broke: Broken pipe"


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_wherever_the_link_is_cut_nobody_has_the_guest_twice(data: st.DataObject) -> None:
    """And the source has it unless it had said go."""
    length = 22 * PAGE_SIZE
    cut = data.draw(st.one_of(st.integers(0, length), st.integers(0, 400), st.integers(length - 4096, length)))
    backwards = data.draw(st.booleans())
    cut = min(cut, 150) if backwards else cut

    def spoil(at: int, piece: bytes) -> bytes | None:
        return piece if at + len(piece) <= cut else None

    clean: Spoil = lambda at, piece: piece  # noqa: E731
    with made_pair() as pair:
        status = pair.run(there=clean if backwards else spoil, back=spoil if backwards else clean)
        assert not (pair.source.running and pair.target.running)
        assert pair.destination is not None and pair.migration is not None
        if status is MigrationStatus.COMPLETED:
            assert pair.target.running and pair.same_memory()
        elif pair.target.running or "handed over" in str(pair.migration.problem):
            assert status is MigrationStatus.FAILED and not pair.source.running
        else:
            assert pair.source.running and pair.source.holds_disks
            assert pair.destination.problem is not None and not pair.target.holds_disks


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 20 * PAGE_SIZE), st.integers(0, 7))  # behind that comes `go`, which hands over
def test_a_flipped_bit_ends_it_and_the_source_goes_on(position: int, bit: int) -> None:
    def spoil(at: int, piece: bytes) -> bytes:
        if not at <= position < at + len(piece):
            return piece
        changed = bytearray(piece)
        changed[position - at] ^= 1 << bit
        return bytes(changed)

    with made_pair() as pair:
        assert pair.run(Parameters(x_stall_timeout=300), there=spoil) is MigrationStatus.FAILED
        assert pair.source.running and not pair.target.running


def test_a_stalled_link_is_given_up(pair: Pair) -> None:
    released = threading.Event()

    def spoil(at: int, piece: bytes) -> bytes | None:
        if at > PAGE_SIZE:
            released.wait(10)
            return None
        return piece

    pair.begin(Parameters(x_stall_timeout=200), Capabilities(), spoil, lambda at, piece: piece)
    assert pair.migration is not None
    pair.migration.join(10)
    released.set()
    assert pair.end() is MigrationStatus.FAILED and pair.source.running


def test_cancelled_in_the_middle(pair: Pair) -> None:
    pair.on_round = lambda number: pair.migration.cancel() if pair.migration else None
    assert pair.run() is MigrationStatus.CANCELLED
    assert pair.source.running and not pair.target.running
    assert [s.value for s in pair.statuses][-2:] == ["cancelling", "cancelled"]
    pair.migration.cancel() if pair.migration else None
    assert pair.migration is not None and pair.migration.status is MigrationStatus.CANCELLED


def test_a_guest_that_dirties_too_fast_is_slowed_down(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.migration.outgoing.SMALL", 0)
    seen: list[int] = []

    def write(number: int) -> None:
        assert pair.migration is not None
        seen.append(pair.migration.throttle_percentage)
        # The more it is held, the less it writes.
        pages = PAGES * (100 - seen[-1]) // 100
        pair.source.memory.write(0, os.urandom(pages * PAGE_SIZE))

    pair.on_round = write
    limits = Parameters(
        downtime_limit=8, max_bandwidth=20_000_000, cpu_throttle_increment=30, max_cpu_throttle=90,
        throttle_trigger_threshold=10, x_stall_timeout=3000,
    )  # fmt: skip
    assert pair.run(limits, Capabilities(auto_converge=True)) is MigrationStatus.COMPLETED
    assert seen[:3] == [0, 20, 50] and pair.same_memory()
    assert pair.migration is not None and pair.migration.throttle_percentage == 0


def test_a_loop_that_does_not_answer_is_a_failure_not_a_hang(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyvmm.migration.loop_call.LOOP_DEADLINE", 0.2)
    pair.source.while_running = lambda: time.sleep(0.5)
    assert pair.run() is MigrationStatus.FAILED
    assert pair.migration is not None and "did not answer" in str(pair.migration.problem)


def test_the_guest_runs_until_the_destination_is_ready(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the destination can do ahead is done while the source's guest runs; if it fails, that guest never stops."""
    seen: list[bool] = []

    def rehearse() -> None:
        seen.append(pair.source.running)
        raise SectionError("cpu-0", "msrs", "odd")

    monkeypatch.setattr(pair.target, "rehearse", rehearse)
    monkeypatch.setattr(pair.source, "pause", lambda: seen.append(False))
    assert pair.run() is MigrationStatus.FAILED
    assert seen == [True] and pair.source.running and not pair.target.running
    assert pair.migration is not None and "odd" in str(pair.migration.problem)


def test_nothing_is_collected_while_the_guest_stands_still(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []
    save = pair.source.save

    def watch() -> bytes:
        enabled.append(gc.isenabled())
        return save()

    monkeypatch.setattr(pair.source, "save", watch)
    assert gc.isenabled()
    assert pair.run() is MigrationStatus.COMPLETED
    assert enabled == [False] and gc.isenabled()


@pytest.mark.parametrize(
    ("left", "worth"),
    [
        ([SMALL], False),
        ([1000], True),
        ([1000, 400], True),
        ([1000, 600], False),  # the guest writes nearly as fast as is sent: the next round would find as many
        ([16000, 7000, 3000, 1400, 600], False),  # enough is enough
        ([60_000], False),  # would take longer than the standstill it shortens may
    ],
)
def test_further_rounds_only_while_they_pay(pair: Pair, left: list[int], worth: bool) -> None:
    migration = OutgoingMigration(pair.source, "fd:0", Parameters(), Capabilities(), post=pair.loop.post)
    migration.bandwidth = 500e6
    assert migration._worth_a_round(left) is worth
