"""Both ends of the disks' connection against each other: real devices, images and logs, no machines."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.block import disk_sums
from pyvmm.block.image import SECTOR, open_image
from pyvmm.block.replica_disk import ReplicaDisk
from pyvmm.block.write_log import MARKER, WRITE, encode_record
from pyvmm.colo import disks
from pyvmm.colo.disks import HEAD, PrimaryDisks, SecondaryDisks
from pyvmm.colo.session import ColoCounters, ColoSession
from pyvmm.errors import ChannelError, HostError
from pyvmm.machine.machine import Machine
from tests.unit.virtio.block_bench import DISCARD, IOERR, OK, OUT, ZEROES, BlkBench, block_bench, ranges

SECTORS = 64
SIZE = SECTORS * SECTOR
TIMEOUT = 5.0


class FakeSession:
    """What the streams ask of one."""

    pair, term, mode = "pair", 3, "hybrid"
    closing = failover_wanted = False

    def __init__(self) -> None:
        self.suspected: list[str] = []
        self.asked: list[str] = []
        self.gave_up = 0
        self.counters = ColoCounters()

    def suspect(self, reason: str) -> None:
        self.suspected.append(reason)

    def give_up(self) -> None:
        self.gave_up += 1

    def ask_checkpoint(self, reason: str) -> None:
        self.asked.append(reason)


class End:
    """One side: a device, and what the machine and the session around it would be."""

    def __init__(self, bench: BlkBench) -> None:
        self.bench = bench
        self.session = FakeSession()
        self.machine = cast(Machine, SimpleNamespace(devices=[bench.transport]))
        self.path = Path(bench.blk.image.path)

    @property
    def colo(self) -> ColoSession:
        return cast(ColoSession, self.session)


class Ends:
    """A primary's and a secondary's, connected."""

    def __init__(self, primary: End, secondary: End, image: Path) -> None:
        self.primary, self.secondary, self.image = primary, secondary, image
        self.sending = PrimaryDisks(primary.machine, primary.colo)
        self.receiving = SecondaryDisks(secondary.machine, secondary.colo)
        self.line, theirs = socket.socketpair()
        self.receiving.check(self.sending.sizes)
        self.sending.connect(self.line, TIMEOUT)
        self.receiving.connect(theirs, "pair", 3)
        self.epoch = 0

    def begin(self) -> None:
        self.sending.learn()
        with standing_still(self.primary.bench):
            self.sending.begin()

    def checkpoint(self) -> None:
        """As primary.py and secondary.py do."""
        self.epoch += 1
        with standing_still(self.primary.bench):
            self.sending.mark(self.epoch)
        self.receiving.wait_marked(self.epoch, TIMEOUT)
        with standing_still(self.secondary.bench):
            self.receiving.commit(self.epoch)

    def same(self) -> bool:
        return self.image.read_bytes() == self.primary.path.read_bytes()


@contextmanager
def standing_still(bench: BlkBench) -> Iterator[None]:
    bench.blk.suspend_io()
    yield
    bench.blk.resume_io()


@contextmanager
def ends() -> Iterator[Ends]:
    with tempfile.TemporaryDirectory(prefix="pyvmm-disks") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        for side in ("one", "two"):
            (folder / f"{side}.img").write_bytes(os.urandom(SIZE))
        replica = ReplicaDisk(str(folder / "two.img"))
        replica.overlay.replica = replica
        secondary = End(stack.enter_context(block_bench(replica.overlay)))
        image = open_image(str(folder / "one.img"), read_only=False)
        primary = End(stack.enter_context(block_bench(image)))
        made = Ends(primary, secondary, folder / "two.img")
        stack.callback(made.receiving.close)
        stack.callback(made.sending.close)
        yield made


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def do_something(bench: BlkBench, chance: random.Random) -> None:
    first = chance.randrange(SECTORS)
    sectors = chance.randint(1, min(20, SECTORS - first))
    kind = chance.choice((OUT, OUT, OUT, DISCARD, ZEROES))
    data = chance.randbytes(sectors * SECTOR) if kind == OUT else ranges((first, sectors, 0))
    assert bench.request(kind, first, data) == (OK, b"")


@settings(max_examples=25, deadline=None)
@given(
    plot=st.lists(st.sampled_from(("write", "write", "replica", "checkpoint")), max_size=24),
    early=st.integers(0, 4), mode=st.sampled_from(("hybrid", "periodic")), seed=st.integers(0, 1 << 32),
)  # fmt: skip
def test_each_checkpoint_is_the_primarys_disk_at_its_pause(plot: list[str], early: int, mode: str, seed: int) -> None:
    chance = random.Random(seed)
    with ends() as pair:
        for _ in range(early):
            do_something(pair.primary.bench, chance)
        pair.begin()
        pair.sending.copy_all()
        pair.checkpoint()
        assert pair.same()
        held = view = pair.image.read_bytes()
        for step in plot:
            if step == "checkpoint":
                pair.checkpoint()
                assert pair.same()
                held = view = pair.image.read_bytes()
            else:
                do_something((pair.primary if step == "write" else pair.secondary).bench, chance)
                assert pair.image.read_bytes() == held  # whatever either does in between
                view = pair.secondary.bench.blk.image.read(0, SIZE)
        pair.secondary.session.mode = mode
        with standing_still(pair.secondary.bench):
            pair.receiving.take_over()
        assert pair.secondary.bench.blk.image.read(0, SIZE) == (view if mode == "hybrid" else held)


def test_without_a_pair_nothing_is_recorded(tmp_path: Path) -> None:
    with ends() as pair:
        do_something(pair.primary.bench, random.Random(1))
        forward = pair.primary.bench.blk._forward
        assert not forward.active and not forward.queued
        pair.begin()
        pair.sending.close()
        do_something(pair.primary.bench, random.Random(1))
        assert not forward.active and not forward.queued


def test_a_checkpoint_whose_writes_never_came_is_none(tmp_path: Path) -> None:
    """The state may be here before the writes, on another connection: a primary that dies in between has no successor
    if that is taken for a failure of this side's.
    """
    with ends() as pair:
        pair.begin()
        pair.sending.copy_all()
        pair.checkpoint()
        pair.line.shutdown(socket.SHUT_RDWR)
        began = time.monotonic()
        with pytest.raises(ChannelError, match="before checkpoint 2 is missing: the disks' connection ended"):
            pair.receiving.wait_marked(2, 30)
        assert time.monotonic() - began < 10 and pair.receiving.problem is None
        pair.receiving.wait_marked(1, 0)  # that one is held
        assert pair.secondary.session.suspected


def test_writes_that_do_not_come_in_time_are_the_lines_fault() -> None:
    with ends() as pair, pytest.raises(ChannelError, match=r"it is not here after 0\.01 s"):
        pair.receiving.wait_marked(1, 0.01)


def test_an_error_of_the_replicas_disk_is_the_replicas_end() -> None:
    """Not one that the guest sees, and would go on with after a failover."""
    with ends() as pair:
        pair.begin()
        pair.sending.copy_all()
        pair.checkpoint()
        overlay = pair.secondary.bench.blk.image
        writable = os.dup(overlay.fd)
        only_read = os.open(f"/proc/self/fd/{overlay.fd}", os.O_RDONLY)
        os.dup2(only_read, overlay.fd)
        try:
            assert pair.secondary.bench.request(OUT, 0, bytes(SECTOR))[0] == IOERR
            wait_until(lambda: pair.secondary.session.gave_up, "nobody gives up")
            with pytest.raises(HostError, match=r"two\.img: the replica failed: writes fail: Bad file descriptor"):
                pair.receiving.wait_marked(2, 30)
            assert pair.secondary.bench.lines == []
        finally:
            os.dup2(writable, overlay.fd)
            os.close(writable)
            os.close(only_read)


def asked(pair: Ends, times: int) -> bool:
    return len(pair.primary.session.asked) == times


def test_a_full_log_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "EPOCH_BYTES", 3 * SIZE)
    with ends() as pair:
        pair.begin()
        pair.sending.copy_all()
        wait_until(lambda: not pair.primary.bench.blk._forward.queued, "it is not sent")
        pair.checkpoint()
        assert pair.primary.session.asked == []  # what the first checkpoint has is in no log
        for expected in (0, 0, 1, 1, 1, 2):
            assert pair.primary.bench.request(OUT, 0, os.urandom(SIZE)) == (OK, b"")
            wait_until(lambda: not pair.primary.bench.blk._forward.queued, "it is not sent")
            wait_until(functools.partial(asked, pair, expected), "nobody asks")
        assert set(pair.primary.session.asked) == {"disks"}


def test_a_secondary_that_takes_nothing_ends_the_pair_and_the_guest_writes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "QUEUED", 4 * SECTOR)
    with ends() as pair:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        pair.sending.learn()
        pair.sending.connect(ours, 0.1)
        with standing_still(pair.primary.bench):
            pair.sending.begin()
        for number in range(40):
            assert pair.primary.bench.request(OUT, number, os.urandom(8 * SECTOR)) == (OK, b"")
        wait_until(lambda: pair.primary.session.suspected, "nobody notices")
        assert "the secondary" in pair.primary.session.suspected[0]
        theirs.close()
        pair.line.close()


def test_a_write_that_the_host_fails_is_told_to_both(tmp_path: Path) -> None:
    with ends() as pair:
        pair.begin()
        fd, image = os.dup(pair.primary.bench.blk.image.fd), pair.primary.bench.blk.image
        only_read = os.open(f"/proc/self/fd/{image.fd}", os.O_RDONLY)
        os.dup2(only_read, image.fd)
        assert pair.primary.bench.request(OUT, 0, bytes(SECTOR))[0] == IOERR
        os.dup2(fd, image.fd)
        os.close(fd)
        os.close(only_read)
        wait_until(lambda: pair.primary.session.suspected, "nobody notices")
        assert os.strerror(errno.EBADF) in pair.primary.session.suspected[0]
        assert pair.primary.bench.request(OUT, 0, bytes(SECTOR)) == (OK, b"")


def test_only_what_differs_is_copied_and_a_broken_copy_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_sums, "PIECE", 8 * SECTOR)
    with ends() as pair:
        content = bytearray(pair.primary.path.read_bytes())
        content[9 * SECTOR] ^= 1
        content[-1] ^= 1
        pair.image.write_bytes(content)  # two of eight pieces differ
        again = Ends(pair.primary, pair.secondary, pair.image)  # its sums are of what is there now
        again.begin()
        chance = random.Random(1)
        for _ in range(5):
            do_something(pair.primary.bench, chance)
        again.sending.copy_all()
        again.checkpoint()
        assert again.same()
        counters = pair.primary.session.counters
        assert counters.disk_copied >= 2 * 8 * SECTOR and counters.disk_copied + counters.disk_same == SIZE
        again.receiving.close()
        again.sending.close()


@settings(max_examples=30, deadline=None)
@given(equal=st.sets(st.integers(0, SECTORS - 1)), writes=st.integers(0, 8), seed=st.integers(0, 1 << 32))
def test_whatever_is_written_while_sums_are_compared(equal: set[int], writes: int, seed: int) -> None:
    """Pieces of a sector: any of them may compare equal, before or after a write to it."""
    chance = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_sums, "PIECE", SECTOR)
        with ends() as first:
            first.receiving.close()
            content = bytearray(first.image.read_bytes())
            theirs = first.primary.path.read_bytes()
            for sector in equal:
                content[sector * SECTOR : (sector + 1) * SECTOR] = theirs[sector * SECTOR : (sector + 1) * SECTOR]
            first.image.write_bytes(content)
            pair = Ends(first.primary, first.secondary, first.image)
            pair.begin()
            for _ in range(writes):
                do_something(first.primary.bench, chance)
            pair.sending.copy_all()
            pair.checkpoint()
            assert pair.same()
            pair.receiving.close()
            pair.sending.close()


@pytest.mark.parametrize(
    "answer", [b"", HEAD.pack(1, 32) + bytes(32), HEAD.pack(0, 31) + bytes(32), HEAD.pack(0, 1 << 31) + bytes(32)]
)
def test_checksums_that_make_no_sense_are_no_protection(answer: bytes) -> None:
    with ends() as pair:
        ours, theirs = socket.socketpair()
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        pair.sending.connect(ours, TIMEOUT)
        with pytest.raises(ChannelError, match=r"no checksums of its disk 0|closed the disks"):
            pair.sending.learn()
        theirs.close()
        pair.line.close()


def message(number: int, records: bytes, size: int | None = None) -> bytes:
    return HEAD.pack(number, len(records) if size is None else size) + records


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (message(1, b""), "0 bytes for disk 1"),
        (message(0, b"", disks.BATCH + 1), f"{disks.BATCH + 1} bytes for disk 0"),
        (message(0, encode_record(WRITE, 1, SIZE, data=bytes(SECTOR))), "of a disk of"),
        (message(0, encode_record(MARKER, 2)), "epoch 2 came where 1 was due"),
        (message(0, encode_record(MARKER, 1)[:-1]), "cut off"),
        (message(0, bytes(32)), "damaged"),
    ],
    ids=["disk", "size", "place", "epoch", "length", "checksum"],
)
def test_what_makes_no_sense_is_the_replicas_end(sent: bytes, says: str) -> None:
    with ends() as pair:
        before = pair.image.read_bytes()
        pair.line.sendall(sent)
        with pytest.raises(ChannelError, match=says):
            pair.receiving.wait_marked(1, 20)
        assert pair.secondary.session.gave_up == 1 and pair.image.read_bytes() == before


@settings(max_examples=40, deadline=None)
@given(junk=st.binary(max_size=200))
def test_whatever_comes_the_receiver_ends_and_nothing_is_marked(junk: bytes) -> None:
    with ends() as pair:
        pair.line.sendall(junk)
        pair.line.shutdown(socket.SHUT_WR)
        with pytest.raises(ChannelError):
            pair.receiving.wait_marked(1, 20)


def test_sizes_must_be_alike() -> None:
    with ends() as pair:
        for sizes in ((), (SIZE, SIZE), (SIZE + SECTOR,)):
            with pytest.raises(ChannelError, match=f"those here {SIZE}"):
                pair.receiving.check(cast(Any, sizes))
