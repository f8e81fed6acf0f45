"""The secondary's disk against a model: whatever is written, marked, committed, taken over, and wherever it dies."""

from __future__ import annotations

import errno
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.block import overlay as overlay_module
from pyvmm.block import pair_file, replica_disk, replica_repair, write_log
from pyvmm.block.image import SECTOR
from pyvmm.block.overlay import open_overlay
from pyvmm.block.pair_file import PairFile, check_startable, overlay_path, pair_path, read_pair, write_pair
from pyvmm.block.replica_disk import ReplicaDisk
from pyvmm.block.replica_repair import repair, settle
from pyvmm.block.write_log import MARKER, WRITE, ZERO, decode_records, encode_record
from pyvmm.errors import ChannelError, ConfigError, HostError, ImageError
from tests.unit.block.power_loss import Died, FaultyOs, faulty

SECTORS = 24
SIZE = SECTORS * SECTOR
MODULES = (write_log, replica_disk, replica_repair, pair_file, overlay_module)
OPERATIONS = ("write", "write", "zero", "marker", "commit", "step", "replica", "replica", "replica flush")


class Model:
    """What the disks have to hold. ``versions[n]``: the image as of checkpoint n."""

    def __init__(self) -> None:
        self.primary = bytearray(SIZE)
        self.marked_as: dict[int, bytes] = {}
        self.committed = self.marked = 0
        self.view = bytearray(SIZE)

    @property
    def image(self) -> bytes:
        return self.marked_as[self.committed]


class Story:
    """A replica and its model, led by random operations."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.path = str(folder / "disk.img")
        Path(self.path).write_bytes(chance.randbytes(SIZE))
        self.chance = chance
        self.model = Model()
        self.disk = ReplicaDisk(self.path)
        self.finished: str | None = None

    def begin(self) -> None:
        self.disk.begin("pair", 7)
        full = self.chance.randbytes(SIZE)
        self.disk.write_from_primary(1, 0, full)
        self.model.primary[:] = full

    def piece(self) -> tuple[int, int]:
        first = self.chance.randrange(SECTORS)
        return first * SECTOR, self.chance.randint(1, min(9, SECTORS - first)) * SECTOR

    def step(self, name: str) -> None:
        disk, model = self.disk, self.model
        offset, length = self.piece()
        epoch = model.marked + 1
        if name == "step":
            for each in ("marker", "commit"):
                self.step(each)
        elif name in ("write", "zero", "marker") and epoch > model.committed + 2:
            with pytest.raises(ChannelError):
                disk.zero_from_primary(epoch, offset, length)
        elif name == "write":
            data = self.chance.randbytes(length)
            disk.write_from_primary(epoch, offset, data)
            model.primary[offset : offset + length] = data
        elif name == "zero":
            disk.zero_from_primary(epoch, offset, length)
            model.primary[offset : offset + length] = bytes(length)
        elif name == "marker":
            model.marked_as[epoch] = bytes(model.primary)  # it may count from here on, whether or not this returns
            disk.marker_from_primary(epoch)
            model.marked = epoch
        elif name == "commit" and model.marked > model.committed:
            disk.commit(model.committed + 1)
            model.committed += 1
            model.view[:] = model.image
        elif name == "replica" and model.committed:
            data = self.chance.randbytes(length)
            disk.overlay.write(offset, data)
            model.view[offset : offset + length] = data
        elif name == "replica flush":
            disk.overlay.flush()

    def fail_over(self, name: str) -> None:
        if self.model.committed:
            self.finished = name
            if name == "hybrid":
                self.disk.failover_hybrid(8)
            else:
                self.disk.failover_periodic(8)

    def survivor_view(self) -> bytes:
        return bytes(self.model.view) if self.finished == "hybrid" else self.model.image

    def check(self) -> None:
        if self.model.committed:
            assert Path(self.path).read_bytes() == self.model.image
            assert self.disk.overlay.read(0, SIZE) == self.model.view

    def die(self) -> None:
        """Nothing is flushed as the process goes."""
        self.disk.overlay.claimed = False
        self.disk.overlay.close()
        self.disk.close()


@contextmanager
def story(chance: random.Random) -> Iterator[Story]:
    with tempfile.TemporaryDirectory(prefix="pyvmm-replica") as folder:
        told = Story(Path(folder), chance)
        try:
            yield told
        finally:
            told.die()


PLOT = st.lists(st.sampled_from(OPERATIONS), max_size=40)
ENDS = st.sampled_from(("", "hybrid", "periodic"))


@settings(max_examples=60, deadline=None)
@given(plot=PLOT, end=ENDS, seed=st.integers(0, 1 << 32))
def test_it_is_the_models_disk_at_every_step(plot: list[str], end: str, seed: int) -> None:
    with story(random.Random(seed)) as told:
        told.begin()
        for name in plot:
            told.step(name)
            told.check()
        if not end or not told.model.committed:
            return
        told.fail_over(end)
        for _ in range(2):  # once more changes nothing
            told.fail_over(end)
            assert told.disk.overlay.read(0, SIZE) == told.survivor_view()
        with pytest.raises(ChannelError, match="no replica any more"):
            told.disk.marker_from_primary(1)
        told.disk.merge()
        told.disk.overlay.write(0, b"s" * SECTOR)
        expected = b"s" * SECTOR + told.survivor_view()[SECTOR:]
        assert told.disk.overlay.read(0, SIZE) == expected
        told.disk.settle()
        assert Path(told.path).read_bytes() == expected and os.listdir(Path(told.path).parent) == ["disk.img"]


@settings(max_examples=250, deadline=None)
@given(plot=PLOT, end=ENDS, at=st.integers(0, 60), power=st.booleans(), again=st.integers(0, 8),
       seed=st.integers(0, 1 << 32))  # fmt: skip
def test_wherever_it_dies_one_checkpoint_is_there_as_a_whole(
    plot: list[str], end: str, at: int, power: bool, again: int, seed: int
) -> None:
    with story(random.Random(seed)) as told, faulty(*MODULES) as system:
        told.begin()
        system.calls_left = at
        with suppress(Died):
            for name in plot:
                told.step(name)
            if end:
                told.fail_over(end)
        system.calls_left = None
        told.die()
        if power:
            system.lose_power(told.chance)
        check_survived(told, system, again, power)


def check_survived(told: Story, system: FaultyOs, again: int, power: bool) -> None:
    found, model = read_pair(told.path), told.model
    assert found is not None
    if found.state == "overlaid":
        assert told.finished is not None and found.term == 8
        with open_overlay(overlay_path(told.path), told.path) as survivor:
            assert survivor.read(0, SIZE) == told.survivor_view()
        return
    if found.state == "syncing":
        assert not model.committed and repair([told.path]) == 0
        return
    system.calls_left = again
    with suppress(Died):
        repair([told.path])
    system.calls_left = None
    if power:
        system.lose_power(told.chance)
    target = repair([told.path])
    assert target >= max(1, model.committed) and target in model.marked_as
    assert target >= model.marked or told.finished
    assert Path(told.path).read_bytes() == model.marked_as[target]


def test_replicas_of_one_machine_are_repaired_to_a_checkpoint_that_all_hold(tmp_path: Path) -> None:
    disks = []
    for name in ("a", "b"):
        path = str(tmp_path / f"{name}.img")
        Path(path).write_bytes(bytes(SIZE))
        disk = ReplicaDisk(path)
        disks.append(disk)
        disk.begin("pair", 1)
        for epoch in (1, 2, 3):
            disk.write_from_primary(epoch, 0, bytes([epoch]) * SECTOR)
            if (name, epoch) != ("b", 3):
                disk.marker_from_primary(epoch)
            if epoch < 3:
                disk.commit(epoch)
    for disk in disks:
        disk.overlay.close()
        disk.close()
    paths = [disk.path for disk in disks]
    assert repair(paths) == repair(paths) == 2
    assert {Path(path).read_bytes()[:SECTOR] for path in paths} == {b"\2" * SECTOR}
    assert repair([]) == 0
    with pytest.raises(ConfigError, match="pyvmm disk repair"):
        check_startable(paths[0])
    for at in range(40):  # wherever that is cut off
        with faulty(*MODULES) as system, suppress(Died):
            system.calls_left = at
            settle([path for path in paths if read_pair(path) is not None])
            break
        assert {Path(path).read_bytes()[:SECTOR] for path in paths} == {b"\2" * SECTOR}
    else:
        raise AssertionError("it never gets to its end")
    assert at > 5 and sorted(os.listdir(tmp_path)) == ["a.img", "b.img"]
    with pytest.raises(ConfigError, match="is no replica"):
        settle(paths)


def test_what_an_older_epoch_left_in_the_log_is_not_taken_for_the_newest(tmp_path: Path) -> None:
    """Its records begin where the newest one's last ends, and a marker is among them."""
    disk = made(tmp_path)
    for epoch in (2, 3):
        for sector in (0, 1):
            disk.write_from_primary(epoch, sector * SECTOR, bytes([epoch]) * SECTOR)
        disk.marker_from_primary(epoch)
        disk.commit(epoch)
    disk.write_from_primary(4, 0, b"\4" * SECTOR)
    disk.overlay.close()
    disk.close()
    assert repair([disk.path]) == 3
    assert Path(disk.path).read_bytes()[: 2 * SECTOR] == b"\3" * 2 * SECTOR


@settings(max_examples=200, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.integers(0, 6), st.integers(0, SIZE * 2), st.integers(0, SIZE * 2)), max_size=4),
    flip=st.none() | st.integers(0, 10_000), cut=st.none() | st.integers(0, 10_000),
)  # fmt: skip
def test_a_hostile_batch_is_refused_as_a_whole_or_is_one(
    kinds: list[tuple[int, int, int]], flip: int | None, cut: int | None
) -> None:
    data = bytearray()
    for kind, offset, length in kinds:
        data += encode_record(kind, 3, offset, length, b"x" * length if kind == WRITE else b"")
    whole = bytes(data)
    if flip is not None and data:
        data[flip % len(data)] ^= 1 << flip % 8
    if cut is not None:
        del data[cut:]
    try:
        records = list(decode_records(memoryview(data), SIZE))
    except ChannelError:
        return
    assert whole.startswith(data)
    for record in records:
        assert record.kind in (WRITE, ZERO, MARKER) and record.epoch == 3
        if record.kind in (WRITE, ZERO):
            assert record.length and not record.length % SECTOR and record.offset + record.length <= SIZE


def made(tmp_path: Path) -> ReplicaDisk:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    disk = ReplicaDisk(str(path), limit=4 * SECTOR)
    disk.begin("pair", 1)
    disk.marker_from_primary(1)
    disk.commit(1)
    return disk


def test_what_comes_out_of_turn_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    disk = made(tmp_path)
    for batch, says in (
        (encode_record(WRITE, 3, 0, data=bytes(SECTOR)), "epoch 3 came where 2 was due"),
        (encode_record(WRITE, 1, 0, data=bytes(SECTOR)), "epoch 1 came where 2 was due"),
        (encode_record(MARKER, 2) + encode_record(ZERO, 2, 0, SECTOR), "behind a marker"),
        (encode_record(ZERO, 2, SIZE, SECTOR), "of a disk of"),
        (encode_record(9, 2), "unknown kind 9"),
        (b"x", "cut off"),
    ):
        with pytest.raises(ChannelError, match=says):
            disk.receive(memoryview(batch))
    disk.write_from_primary(2, 0, b"k" * SECTOR)
    assert disk.receive(memoryview(encode_record(MARKER, 2))) == 2
    disk.commit(2)
    assert disk.overlay.read(0, SECTOR) == b"k" * SECTOR
    disk.overlay.close()
    disk.close()


@pytest.mark.parametrize("where", ["write", "marker", "commit", "full"])
def test_a_failing_disk_ends_the_replica_and_says_so_each_time(tmp_path: Path, where: str) -> None:
    disk = made(tmp_path)
    with faulty(*MODULES) as system:
        disk.write_from_primary(2, 0, bytes(SECTOR))
        if where == "commit":
            disk.marker_from_primary(2)
        system.fails = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if where != "full" else None
        for _ in range(2):
            with pytest.raises(HostError, match=r"No space left|more than 0 MiB"):
                if where == "write":
                    disk.write_from_primary(2, 0, bytes(SECTOR))
                elif where == "marker":
                    disk.marker_from_primary(2)
                elif where == "full":
                    disk.write_from_primary(2, 0, bytes(4 * SECTOR))
                else:
                    disk.commit(2)
            system.fails = None
    disk.overlay.close()
    disk.close()


def test_a_disk_of_a_pair_is_not_started_by_accident(tmp_path: Path) -> None:
    image = str(tmp_path / "disk.img")
    check_startable(image)
    for role, state, says in (
        ("primary", "protected", "may have taken the guest over"),
        ("secondary", "syncing", "half a copy"),
        ("secondary", "replica", "--colo secondary"),
        ("primary", "overlaid", f"overlay={overlay_path(image)}"),
    ):
        write_pair(image, PairFile(pair="p", term=3, role=role, state=state))  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=says):
            check_startable(image)
    check_startable(image, overlay_path(image))
    Path(pair_path(image)).write_text("{")
    with pytest.raises(ImageError, match="remove the file"):
        check_startable(image)


def test_a_survivors_disk_is_not_made_a_replica(tmp_path: Path) -> None:
    disk = made(tmp_path)
    disk.failover_hybrid(2)
    disk.overlay.close()
    disk.close()
    with pytest.raises(ConfigError, match="newest writes"):
        ReplicaDisk(disk.path)
    assert os.path.exists(overlay_path(disk.path))
