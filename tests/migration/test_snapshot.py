"""Snapshots: many lives from one file, and nothing from a file that is not whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86 import layout
from pyvmm.cli.machine_options import resolve_quirks
from pyvmm.errors import ConfigError, ImageError, PyvmmError, SectionError
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import DiskConfig, RngConfig
from pyvmm.machine.guest_catalog import load_catalog
from pyvmm.machine.machine import Machine
from pyvmm.machine.run_state import RunState
from pyvmm.migration import snapshot_file
from pyvmm.migration.sections import decode_sections
from pyvmm.migration.snapshot import load_snapshot, restore_snapshot, save_snapshot
from pyvmm.migration.snapshot_file import DiskStamp, SnapshotFile
from tests.framework.moving import run_for, twin_of

CATALOG = load_catalog(Path(__file__).resolve().parents[2] / "guests" / "guests.toml")
Keep = Callable[[Machine], Machine]


@pytest.fixture
def keep() -> Iterator[Keep]:
    """Closes what it is given, at the end."""
    install_kick_signal()
    machines: list[Machine] = []

    def take(machine: Machine) -> Machine:
        machines.append(machine)
        return machine

    yield take
    for machine in machines:
        machine.close()


def built(**options: Any) -> Machine:
    guest = CATALOG["dirtier"]
    config: dict[str, Any] = {"image": str(guest.image), "memory": guest.memory_bytes, "serial": "null"}
    return build_machine(MachineConfig(**config | options), resolve_quirks(None))


def output_of(machine: Machine) -> bytearray:
    output = bytearray()
    machine.backend.observe = output.extend
    return output


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of a machine that has hardly run, 4 MiB."""
    install_kick_signal()
    path = tmp_path_factory.mktemp("snapshot") / "small.pvsnap"
    image = path.with_name("spin.bin")
    image.write_bytes(b"\xeb\xfe".ljust(512, b"\1"))
    machine = built(image=str(image), memory=4 << 20, devices=(RngConfig(),))
    try:
        save_snapshot(machine, str(path), description="small")
    finally:
        machine.close()
    return path


def test_two_machines_go_on_from_one_snapshot_and_so_does_the_saved_one(keep: Keep, tmp_path: Path) -> None:
    path = str(tmp_path / "a.pvsnap")
    machine = keep(built())
    output = output_of(machine)

    def save() -> None:
        save_snapshot(machine, path)

    machine.loop.call_later(0.3, save)
    ending = run_for(machine, 60)
    assert ending is not None and ending.kind == "halt"
    lines = output.decode().splitlines()
    assert lines[-1] == "done"
    content = Path(path).read_bytes()
    for _ in range(2):
        twin = keep(load_snapshot(path, verify=True))
        rest = output_of(twin)
        ending = run_for(twin, 60)
        assert ending is not None and ending.kind == "halt"
        said = rest.decode().splitlines()
        assert said[-1] == "done" and 2 <= len(said) <= len(lines)
        assert Path(path).read_bytes() == content, "a guest wrote to its snapshot"


def test_a_machine_goes_back_to_its_snapshot_and_a_reset_leads_out_of_it(keep: Keep, tmp_path: Path) -> None:
    path = str(tmp_path / "a.pvsnap")
    machine = keep(built(append="rounds=0 period=20"))
    output = output_of(machine)
    assert run_for(machine, 0.5) is None
    save_snapshot(machine, path)
    at = output.count(b"round ")
    machine.resume()
    machine.loop.call_later(0.3, machine.loop.stop)
    machine.loop.run()
    assert output.count(b"round ") > at
    header = restore_snapshot(machine, path)
    assert machine.run_state is RunState.PAUSED and not header.was_running
    del output[:]
    machine.resume()
    machine.loop.call_later(0.3, machine.loop.stop)
    machine.loop.run()
    assert f"round {at + 1}: ".encode() in output or f"round {at}: ".encode() in output
    del output[:]
    machine.request_reset("test")
    machine.loop.call_later(0.6, machine.loop.stop)
    machine.loop.run()
    assert b"for ever\r\nround 1: " in output or b"for ever\nround 1: " in output


def test_each_life_from_a_snapshot_is_another_generation(keep: Keep, small: Path) -> None:
    seen = [keep(load_snapshot(str(small))).memory.read(layout.VMGENID, 16) for _ in range(2)]
    machine = keep(built())
    seen.append(machine.memory.read(layout.VMGENID, 16))
    assert len(set(seen)) == 3 and bytes(16) not in seen
    twin = keep(twin_of(machine))  # moved, not multiplied
    assert twin.memory.read(layout.VMGENID, 16) == seen[2]


def test_what_a_snapshot_says_of_itself(small: Path) -> None:
    with SnapshotFile(str(small)) as file:
        header = file.header
    assert header.description == "small" and not header.was_running
    assert sum(part.size for part in header.ram) == 4 << 20
    assert os.stat(small).st_blocks * 512 < 1 << 20, "pages of zeros are not holes"
    assert os.stat(small).st_mode & 0o077 == 0, "a guest's memory is nobody else's to read"


def checked(path: Path) -> None:
    """All that loading checks before it builds a machine."""
    with SnapshotFile(str(path)) as file:
        decode_sections(file.state())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_before_ram_is_refused(small: Path, tmp_path: Path, data: st.DataObject) -> None:
    with SnapshotFile(str(small)) as file:
        meant = file._state_offset + file.header.state_size
    content = bytearray(small.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "longer", "zeros"]))
    if kind == "flip":
        bit = data.draw(st.integers(0, meant * 8 - 1))
        content[bit // 8] ^= 1 << bit % 8
    elif kind == "cut":
        del content[data.draw(st.one_of(st.integers(0, meant), st.integers(0, len(content) - 1))) :]
    elif kind == "longer":
        content += bytes(data.draw(st.integers(1, 9000)))
    else:
        start = data.draw(st.integers(0, meant - 64))
        content[start : start + 64] = b"\xa5" * 64
    damaged = tmp_path / "damaged.pvsnap"
    damaged.write_bytes(content)
    with pytest.raises((ImageError, SectionError)) as refused:
        checked(damaged)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("at", [0, 0x7C00, (4 << 20) - 1])
def test_damage_in_ram_is_found_by_who_looks(small: Path, tmp_path: Path, at: int) -> None:
    damaged = tmp_path / "damaged.pvsnap"
    content = bytearray(small.read_bytes())
    with SnapshotFile(str(small)) as file:
        content[file.header.ram[0].offset + at] ^= 0x10
    damaged.write_bytes(content)
    install_kick_signal()
    load_snapshot(str(damaged)).close()
    with pytest.raises(ImageError, match="CRC of the region at 0x0"):
        load_snapshot(str(damaged), verify=True)


def rewritten(small: Path, path: Path, **fields: Any) -> Path:
    """The snapshot with another header, whose CRC fits."""
    with SnapshotFile(str(small)) as file:
        head = snapshot_file.pack_head(msgspec.structs.replace(file.header, **fields))
        state, offset = file.state(), file.header.ram[0].offset
    content = small.read_bytes()
    path.write_bytes((head + state).ljust(offset, b"\0") + content[offset:])
    return path


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"state_size": 1 << 30}, "header"),
        ({"ram": ()}, "header"),
        ({"id": "../../x"}, "header"),
        ({"compression": "lzma"}, "header"),
        ({"config": {}}, "config"),
        ({"config": {"image": "x", "memory": 1}}, "config: --memory 1"),
        ({"config": {"image": "x", "devices": [{"type": "Zap"}]}}, "config"),
    ],
)
def test_headers_that_make_no_sense(small: Path, tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    path = rewritten(small, tmp_path / "odd.pvsnap", **fields)
    with pytest.raises(ImageError, match=says):
        load_snapshot(str(path))


def test_ram_that_is_not_in_the_file(small: Path, tmp_path: Path) -> None:
    with SnapshotFile(str(small)) as file:
        part = file.header.ram[0]
    beyond = (1 << 64) - 4096
    for change in ({"offset": 0}, {"offset": part.offset + 1}, {"size": 0}, {"length": 1 << 40}, {"size": beyond}):
        path = rewritten(small, tmp_path / "odd.pvsnap", ram=(msgspec.structs.replace(part, **change),))
        with pytest.raises(ImageError, match=r"ram|length"):
            load_snapshot(str(path))


@pytest.mark.parametrize("path", ["/nonexistent/x", "/", "/dev/null", "/proc/self/mem"])
def test_what_is_no_snapshot(path: str) -> None:
    with pytest.raises(ImageError, match=path):
        load_snapshot(path)


def test_a_failure_leaves_the_old_file_and_nothing_else(
    keep: Keep, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pvsnap"
    path.write_bytes(b"old")
    machine = keep(built(memory=16 << 20))

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"a\.pvsnap: No space left"):
        save_snapshot(machine, str(path))
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.pvsnap"]
    with pytest.raises(ConfigError, match="No such file"):
        save_snapshot(machine, "/nonexistent/a")


def test_a_disk_that_has_changed_is_not_gone_on_with(small: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4096))
    found = disk.stat()
    stamp = DiskStamp(path=str(disk), size=found.st_size, modified_ns=found.st_mtime_ns)
    path = str(rewritten(small, tmp_path / "d.pvsnap", disks=(stamp,)))
    load_snapshot(path).close()
    disk.write_bytes(bytes(4097))
    with pytest.raises(ConfigError, match=r"disk\.img was written to since"):
        load_snapshot(path)


def test_another_machine_is_refused_and_stays_what_it_is(keep: Keep, small: Path) -> None:
    other = keep(built(memory=8 << 20))
    before = other.memory.read(0, 8 << 20)
    with pytest.raises(PyvmmError, match="memory: 4 MiB at 0x0 was saved, this machine has 8 MiB"):
        restore_snapshot(other, str(small))
    assert other.memory.read(0, 8 << 20) == before
    assert DiskConfig(path="x") in msgspec.convert(
        msgspec.to_builtins(MachineConfig(image="i", devices=(DiskConfig(path="x"),))), MachineConfig
    ).devices
