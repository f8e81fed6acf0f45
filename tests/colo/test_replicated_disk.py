"""A protected guest's disk: what it wrote and was told is there with the survivor, and nothing else is."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

import pytest

from pyvmm.cli import main
from tests.colo.test_pair import MODES, kill
from tests.framework.migrating import Side
from tests.framework.pairs import PATIENT, Pair, check_contiguous, colo_status, pairs, wait_alone, wait_protected
from tests.framework.processes import REPOSITORY, pyvmm, refused

pytestmark = [pytest.mark.timeout(120)]
GUEST = REPOSITORY / "guests" / "disk-reader"
SECTORS = 64
LARGE = 8 << 20
EPOCH_NUMBERS = 100
"""More than the guest writes in an epoch and the time that a checkpoint takes."""


def image(folder: Path, name: str, sectors: int = SECTORS) -> Path:
    made = folder / f"{name}.img"
    made.write_bytes(bytes(sectors * 512))
    return made


def numbers_in(output: bytes) -> list[int]:
    """A line that was cut short at the end does not count."""
    return [int(number) for number in re.findall(rb"^wrote ([0-9]+)\r?\n", output, re.M)]


def check_disk(path: Path, last: int) -> None:
    """Every number up to ``last``, or one that came after it, is in its place."""
    data = path.read_bytes()
    for place in range(SECTORS):
        (found,) = struct.unpack_from("<Q", data, place * 512)
        newest = max(last - (last - place) % SECTORS, 0)
        assert found >= newest, (place, found, last)
        assert not found or found % SECTORS == place, (place, found)


class SmallFolder(NamedTuple):
    """What runs in it finds a disk there, and room for the log of some hundred numbers."""

    folder: Path

    def command(self, *words: str) -> list[str]:
        script = (
            f"mount -t tmpfs -o size=512k none {self.folder} && truncate -s {SECTORS * 512} {self.folder}/two.img &&"
            ' exec "$@"'
        )
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *words]


class DiskPair:
    """Sides that have a disk each."""

    def __init__(self, folder: Path, pair: Pair) -> None:
        self.folder, self.pair = folder, pair

    def _disk(self, name: str) -> tuple[str, str]:
        return "--disk", str(image(self.folder, name))

    def secondary(self, name: str) -> Side:
        return self.pair.secondary(*self._disk(name), *PATIENT, name=name)

    def primary(self, name: str, peer: Side | None, *options: str) -> Side:
        return self.pair.primary(peer, *self._disk(name), *options, name=name)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.img"


@pytest.mark.parametrize("mode", MODES)
def test_what_was_told_is_on_the_survivors_disk(tmp_path: Path, mode: str) -> None:
    with pairs(tmp_path, (str(GUEST), "--append", "size=512 journal=500")) as pair:
        disks = DiskPair(tmp_path, pair)
        secondary = disks.secondary("two")
        primary = disks.primary("one", secondary, *MODES[mode])
        wait_protected(primary, epoch=4)
        primary.wait_for_text(b"wrote 100")
        said = numbers_in(kill(primary))
        wait_alone(secondary)
        secondary.wait_for_text(b"wrote %d" % (said[-1] + 100))  # it reads what it finds, and checks it
        goes_on = numbers_in(secondary.quit())
        check_contiguous(said)
        check_contiguous(goes_on)
        if mode == "periodic":
            assert said[-1] < goes_on[0] <= said[-1] + EPOCH_NUMBERS
        check_disk(disks.path("two"), goes_on[-1])
        assert sorted(file.name for file in tmp_path.glob("two.img*")) == ["two.img"]  # a plain disk again
        text = refused("run", str(GUEST), "--disk", str(disks.path("one")))
        assert "belongs to the pair" in text  # the other side took the guest over


def test_both_disks_are_the_same_when_nothing_is_under_way_and_a_survivor_is_protected_again(tmp_path: Path) -> None:
    with pairs(tmp_path, (str(GUEST), "--append", "size=512 journal=500")) as pair:
        disks = DiskPair(tmp_path, pair)
        side = disks.primary("one", None, *MODES["hybrid"])
        side.wait_for_text(b"wrote 70")  # all of the disk
        for name in ("two", "three"):
            secondary = disks.secondary(name)
            side.qmp.execute("x-colo-protect", {"uri": pair.uri_of(name)})
            wait_protected(side, epoch=1)  # the next one of a survivor, which has the usual delay, is 20 s away
            side.qmp.execute("stop")
            side.qmp.execute("colo-checkpoint-now")
            wait_protected(side, epoch=int(colo_status(side)["x-epoch"]) + 1)
            newest = side.path.parent / f"{side.name}.img"
            if name == "two":  # later the newest is partly in an overlay
                assert disks.path(name).read_bytes() == newest.read_bytes()
            side.qmp.execute("cont")
            wait_protected(side, epoch=int(colo_status(side)["x-epoch"]) + 1)
            kill(side)
            wait_alone(secondary)
            side = secondary
            side.wait_for_text(b"wrote ")
        numbers = numbers_in(side.output)
        side.wait_for_text(b"wrote %d" % (numbers[-1] + 100))
        check_disk_of = numbers_in(side.quit())
        check_disk(disks.path("three"), check_disk_of[-1])


def test_the_disks_of_a_running_pair_are_compared(tmp_path: Path) -> None:
    with pairs(tmp_path, (str(GUEST), "--append", "size=512 journal=500")) as pair:
        disks = DiskPair(tmp_path, pair)
        secondary = disks.secondary("two")
        primary = disks.primary("one", secondary, *MODES["periodic"])
        wait_protected(primary, epoch=2)
        both = (primary.name, secondary.name)
        for _ in range(3):
            primary.wait_for_text(b"wrote %d" % ((numbers_in(primary.output) or [0])[-1] + 20))
            done = pyvmm("colo", "compare", *both)
            assert (done.returncode, done.stderr) == (0, b""), done
            assert re.match(rb"the same as of checkpoint [0-9]+: 1 disks, 0\.0 MiB; the guest stood still", done.stdout)
        # Somebody else's hand on the secondary's disk, where the guest does not write again before the next look.
        primary.qmp.execute("stop")
        primary.qmp.execute("colo-checkpoint-now")
        wait_protected(primary, epoch=int(colo_status(primary)["x-epoch"]) + 1)
        with disks.path("two").open("r+b") as file:
            file.seek(5 * 512 + 100)
            file.write(b"rotten")
        done = pyvmm("colo", "compare", *both, "--json")
        found = json.loads(done.stdout)
        assert (done.returncode, found["differences"]) == (1, [[0, 0, SECTORS * 512]])
        assert "not the primary and the secondary" in refused("colo", "compare", both[1], both[0])
        done = pyvmm("disk", "compare", str(disks.path("one")), str(disks.path("one")))
        assert done.returncode == 125 and b"is written by another process" in done.stderr
        primary.qmp.execute("cont")
        kill(secondary)
        wait_alone(primary)
        primary.quit()
        done = pyvmm("disk", "compare", str(disks.path("one")), str(disks.path("two")))
        assert (done.returncode, done.stdout.splitlines()[0]) == (1, b"32768 bytes from 0x0 on")
        (tmp_path / "copy").write_bytes(disks.path("one").read_bytes())
        done = pyvmm("disk", "compare", str(disks.path("one")), str(tmp_path / "copy"))
        assert (done.returncode, done.stdout) == (0, b"32768 bytes, the same\n")


def test_what_a_new_secondary_has_already_is_not_copied(tmp_path: Path) -> None:
    """Twice the same images: the second time only what was written since goes over."""
    with pairs(tmp_path, (str(GUEST), "--append", "size=512 journal=500")) as pair:
        disks = DiskPair(tmp_path, pair)
        large = {}
        for name, content in (("one", os.urandom(LARGE)), ("two", bytes(LARGE))):
            large[name] = tmp_path / f"{name}-large.img"
            large[name].write_bytes(content)

        def begin(name: str) -> Side:
            two = ("--disk", str(disks.path("two")), "--disk", str(large["two"]))
            return pair.secondary(*two, *PATIENT, name=name)

        for name in ("one", "two"):
            image(tmp_path, name)
        secondary = begin("two")
        primary = pair.primary(
            secondary, "--disk", str(disks.path("one")), "--disk", str(large["one"]), *MODES["hybrid"], name="one"
        )
        wait_protected(primary, epoch=2)
        stats = primary.qmp.execute("query-colo-stats", oob=True)
        assert stats["disk-copied"] >= LARGE  # all of the large one, which was zeros
        kill(secondary)
        wait_alone(primary)
        before = stats["disk-copied"]
        begin("two-again")
        primary.qmp.execute("x-colo-protect", {"uri": pair.uri_of("two-again")})
        wait_protected(primary, epoch=2)
        stats = primary.qmp.execute("query-colo-stats", oob=True)
        assert stats["disk-copied"] - before <= SECTORS * 512
        assert stats["disk-same"] >= LARGE
        primary.qmp.execute("stop")
        primary.qmp.execute("colo-checkpoint-now")
        wait_protected(primary, epoch=int(colo_status(primary)["x-epoch"]) + 1)
        assert large["one"].read_bytes() == large["two"].read_bytes()
        assert disks.path("one").read_bytes() == disks.path("two").read_bytes()


def test_a_secondary_whose_disk_fails_ends_and_the_guest_goes_on(tmp_path: Path) -> None:
    with pairs(tmp_path, (str(GUEST), "--append", "size=512 journal=50")) as pair:
        disks = DiskPair(tmp_path, pair)
        (tmp_path / "small").mkdir()
        small = SmallFolder(tmp_path / "small")
        secondary = pair.secondary("--disk", str(small.folder / "two.img"), *PATIENT, name="two", inside=small)
        primary = disks.primary("one", secondary, *MODES["periodic"], "--checkpoint-delay", "60000")
        wait_protected(primary)
        status = wait_alone(primary)
        assert (status["last-mode"], status["reason"]) == ("primary", "error")
        code, said, problems = secondary.end()
        assert (code, said) == (125, b"")
        assert "the replica failed: No space left on device" in problems and problems.count("\n") == 1
        numbers = numbers_in(primary.output)
        primary.wait_for_text(b"wrote %d" % ((numbers or [0])[-1] + 50))
        check_contiguous(numbers_in(primary.quit()))
        assert not (tmp_path / "one.img.colo").exists()


def test_a_dead_secondarys_disk_can_be_had_when_the_primarys_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pairs(tmp_path, (str(GUEST), "--append", "size=512 journal=500")) as pair:
        disks = DiskPair(tmp_path, pair)
        secondary = disks.secondary("two")
        primary = disks.primary("one", secondary, *MODES["periodic"])
        wait_protected(primary)
        primary.wait_for_text(b"wrote 70")
        said = numbers_in(primary.output)
        path = str(disks.path("two"))
        assert main(["disk", "repair", path]) == 125 and "in use" in capsys.readouterr().err
        kill(secondary)
        wait_alone(primary)
        assert "pyvmm disk repair" in refused("run", str(GUEST), "--disk", path)
        assert main(["disk", "repair", path]) == 0
        assert "as of checkpoint " in capsys.readouterr().out
        check_disk(disks.path("two"), said[-1])
        assert sorted(file.name for file in tmp_path.glob("two.img*")) == ["two.img"]


def test_disks_of_different_sizes_are_no_pair(tmp_path: Path) -> None:
    with pairs(tmp_path, (str(GUEST), "--append", "size=512 journal=500")) as pair:
        disks = DiskPair(tmp_path, pair)
        secondary = pair.secondary("--disk", str(image(tmp_path, "two", 2 * SECTORS)), name="two")
        primary = disks.primary("one", secondary)
        assert "have 32768 bytes, those here 65536" in str(primary.migrated().get("error-desc"))
        assert colo_status(primary)["mode"] == "none"
        code, _, problems = secondary.end()
        assert code == 125 and "those here 65536" in problems
        check_contiguous(numbers_in(primary.quit()))
