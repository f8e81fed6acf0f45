"""Differential and compressed snapshots: what they hold, what they build on, and what is refused."""

from __future__ import annotations

import argparse
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.cli import snapshot as cli
from pyvmm.cli.machine_options import resolve_quirks
from pyvmm.errors import ConfigError, ImageError, SectionError
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.machine import Machine
from pyvmm.memory.guest_memory import PAGE_SIZE, Region
from pyvmm.migration import snapshot_file, snapshot_zstd
from pyvmm.migration.snapshot import load_snapshot, restore_snapshot, save_snapshot, verify_ram
from pyvmm.migration.snapshot_chain import CHAIN_MAX, SnapshotChain
from pyvmm.migration.snapshot_file import SnapshotFile

SIZE = 4 << 20


def built(folder: Path, memory: int = SIZE) -> Machine:
    install_kick_signal()
    image = folder / "spin.bin"
    image.write_bytes(b"\xeb\xfe".ljust(512, b"\1"))
    return build_machine(MachineConfig(image=str(image), memory=memory, serial="null"), resolve_quirks(None))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = built(tmp_path)
    yield made
    made.close()


def content_of(path: Path, *, verify: bool = True) -> bytes:
    """RAM but what each life gets anew: the VM generation ID's page."""
    loaded = load_snapshot(str(path), verify=verify)
    try:
        return loaded.memory.read(1 << 20, SIZE - (1 << 20))
    finally:
        loaded.close()


def stored(path: Path) -> int:
    with SnapshotFile(str(path)) as file:
        return sum(part.pages for part in file.header.ram)


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("base_compress", ["none", "zstd"])
def test_a_chain_gives_back_every_page(machine: Machine, tmp_path: Path, base_compress: Any, compress: Any) -> None:
    memory, at = machine.memory, 2 << 20
    memory.write(at, b"kept" * 1024 + b"zeroed" * 4096 + b"changed" * 4096)
    paths = [tmp_path / f"{n}.pvsnap" for n in range(3)]
    save_snapshot(machine, str(paths[0]), compress=base_compress)
    whole = [memory.read(1 << 20, SIZE - (1 << 20))]
    memory.zero(at + 2 * PAGE_SIZE, 2 * PAGE_SIZE)
    memory.write(at + 9 * PAGE_SIZE + 7, b"!")
    memory.write(SIZE - 1, b"\xff")
    save_snapshot(machine, str(paths[1]), base=str(paths[0]), compress=compress)
    whole.append(memory.read(1 << 20, SIZE - (1 << 20)))
    memory.write(at + 2 * PAGE_SIZE, b"again")
    save_snapshot(machine, str(paths[2]), base=str(paths[1]), compress=compress)
    whole.append(memory.read(1 << 20, SIZE - (1 << 20)))
    assert [content_of(path) for path in paths] == whole
    assert stored(paths[1]) <= 3 and stored(paths[2]) <= 2, "more than what differs was stored"
    assert os.stat(paths[1]).st_blocks * 512 < 128 << 10
    restore_snapshot(machine, str(paths[1]))
    assert memory.read(1 << 20, SIZE - (1 << 20)) == whole[1]
    machine.memory.write(at, b"own")
    save_snapshot(machine, str(tmp_path / "own.pvsnap"), base=str(paths[2]))  # not of its past
    assert content_of(tmp_path / "own.pvsnap") == memory.read(1 << 20, SIZE - (1 << 20))
    assert content_of(paths[1]) == whole[1], "a guest wrote to its snapshot"


def runs_of(data: st.DataObject, pages: int) -> bytes:
    return b"".join(bytes([data.draw(st.integers(0, 2))]) * PAGE_SIZE for _ in range(pages))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), room=st.integers(1, 6))
def test_differences_hold_every_page_that_differs(data: st.DataObject, room: int) -> None:
    pages = 24
    mine, base = Region(0, pages * PAGE_SIZE, "mine"), Region(0, pages * PAGE_SIZE, "base")
    try:
        contents = []
        for region in (mine, base):
            content = runs_of(data, pages)
            for n in range(pages):  # zeros stay holes
                if content[n * PAGE_SIZE]:
                    region.fill_pages(n, content[n * PAGE_SIZE : (n + 1) * PAGE_SIZE])
            contents.append([content[n * PAGE_SIZE] for n in range(pages)])
        for other, was in ((base, contents[1]), (None, [0] * pages)):
            runs = mine.differences(other, room)
            held = [n for first, count in runs for n in range(first, first + count)]
            differ = {n for n in range(pages) if contents[0][n] != was[n]}
            assert held == sorted(set(held)) and differ <= set(held) <= set(range(pages)) and len(runs) <= room
            starts = [n for n in differ if n - 1 not in differ]
            assert len(starts) > room or set(held) == differ, "pages that do not differ, though there was room"
    finally:
        mine.close()
        base.close()


def test_a_base_that_is_missing_or_another_is_refused_by_name(machine: Machine, tmp_path: Path) -> None:
    base, top = tmp_path / "base.pvsnap", tmp_path / "top.pvsnap"
    save_snapshot(machine, str(base))
    with pytest.raises(ConfigError, match=r"base\.pvsnap: a snapshot cannot take the place"):
        save_snapshot(machine, str(base), base=str(base))
    save_snapshot(machine, str(top), base=str(base))
    with pytest.raises(ConfigError, match=r"base\.pvsnap: cannot be replaced: top built on it"):
        save_snapshot(machine, str(base))
    aside = base.rename(tmp_path / "aside")
    with pytest.raises(ConfigError, match=r"top\.pvsnap: its base .*base\.pvsnap is missing"):
        load_snapshot(str(top))
    save_snapshot(machine, str(tmp_path / "other"))
    os.rename(tmp_path / "other", base)
    with pytest.raises(ConfigError, match=r"base\.pvsnap is another than it was"):
        load_snapshot(str(top))
    aside.rename(base)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in (base, top):
        path.rename(moved / path.name)
    content_of(moved / "top.pvsnap")  # a folder can be moved as a whole
    with pytest.raises(ImageError, match="No such file"):
        save_snapshot(machine, str(top), base="/nonexistent/base")


def test_a_base_of_another_make_and_a_chain_without_end(machine: Machine, tmp_path: Path) -> None:
    base = tmp_path / "0.pvsnap"
    save_snapshot(machine, str(base))
    larger = built(tmp_path, 2 * SIZE)
    try:
        with pytest.raises(ImageError, match="other regions than the machine has"):
            save_snapshot(larger, str(tmp_path / "x.pvsnap"), base=str(base))
    finally:
        larger.close()
    for n in range(1, CHAIN_MAX):
        save_snapshot(machine, str(tmp_path / f"{n}.pvsnap"), base=str(tmp_path / f"{n - 1}.pvsnap"))
    with pytest.raises(ConfigError, match="save a full one"):
        save_snapshot(machine, str(tmp_path / "x.pvsnap"), base=str(tmp_path / f"{CHAIN_MAX - 1}.pvsnap"))
    assert content_of(tmp_path / f"{CHAIN_MAX - 1}.pvsnap") == content_of(base)


def test_what_others_build_on_is_not_deleted(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, top = tmp_path / "base.pvsnap", tmp_path / "top.pvsnap"
    save_snapshot(machine, str(base), compress="zstd")
    save_snapshot(machine, str(top), base=str(base))
    with pytest.raises(ConfigError, match=r"base\.pvsnap: cannot be deleted: top built on it; delete those first"):
        cli.run_delete(argparse.Namespace(name=str(base)))
    cli.run_info(argparse.Namespace(name=str(top), verify=True, json=True))
    facts = msgspec.json.decode(capsys.readouterr().out)
    assert facts["base"] == "base" and facts["chain"] == [str(base)] and facts["compression"] == "none"
    cli.run_list(argparse.Namespace(folder=str(tmp_path), json=False))
    assert "(on base)" in capsys.readouterr().out
    for path in (top, base):
        cli.run_delete(argparse.Namespace(name=str(path)))
    assert not base.exists() and not top.exists()


def test_without_the_library_one_line_says_what_to_install(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pvsnap"
    save_snapshot(machine, str(path), compress="zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=r"pip install zstandard\Z"):
        save_snapshot(machine, str(tmp_path / "b.pvsnap"), compress="zstd")
    with pytest.raises(ConfigError, match=r"pip install zstandard\Z"):
        load_snapshot(str(path))
    assert not (tmp_path / "b.pvsnap").exists()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed differential snapshot; its base, full and compressed, is beside it."""
    folder = tmp_path_factory.mktemp("chain")
    made = built(folder)
    try:
        made.memory.write(2 << 20, bytes(range(256)) * 256)
        save_snapshot(made, str(folder / "base.pvsnap"), compress="zstd")
        made.memory.write(3 << 20, bytes(range(255, -1, -1)) * 256)
        save_snapshot(made, str(folder / "top.pvsnap"), base=str(folder / "base.pvsnap"), compress="zstd")
    finally:
        made.close()
    return folder / "top.pvsnap"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), whose=st.sampled_from(["base.pvsnap", "top.pvsnap"]))
def test_any_damage_to_a_compressed_chain_is_refused(
    chain: Path, tmp_path: Path, data: st.DataObject, whose: str
) -> None:
    for name in ("base.pvsnap", "top.pvsnap"):
        (tmp_path / name).write_bytes(chain.with_name(name).read_bytes())
    with SnapshotFile(str(tmp_path / whose)) as file:
        part = file.header.ram[0]
        before_ram = file._state_offset + file.header.state_size
    content = bytearray((tmp_path / whose).read_bytes())
    place = st.one_of(st.integers(0, before_ram - 1), st.integers(part.offset, len(content) - 1))
    if data.draw(st.booleans()):
        content[data.draw(place)] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(place) :]
    (tmp_path / whose).write_bytes(content)
    # A page's number may be damaged such that it still is one: that is for the CRC to find.
    try:
        with SnapshotChain(str(tmp_path / "top.pvsnap")) as opened:
            for file in opened.files:
                decode_state(file)
            verify_ram(opened)
    except (ImageError, SectionError, ConfigError) as refused:
        assert "\n" not in str(refused)
    else:  # some bits of a zstd frame mean nothing: it says the same without them
        assert unpacked(tmp_path / whose) == unpacked(chain.with_name(whose))


def unpacked(path: Path) -> bytes:
    """All of the pages in a compressed file; zeros where it has none."""
    with SnapshotFile(str(path)) as file, path.open("rb") as raw:
        part = file.header.ram[0]
        region = Region(part.gpa, part.size, "unpacked")
        try:
            snapshot_zstd.read_compressed(str(path), raw.fileno(), part.offset, part.length, region)
            return region.pages(0, part.size // PAGE_SIZE)
        finally:
            region.close()


def decode_state(file: SnapshotFile) -> None:
    from pyvmm.migration.sections import decode_sections

    decode_sections(file.state())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"runs": ((0, 2), (1, 1))}, "runs"),
        ({"runs": ((5, 0),)}, "runs"),
        ({"runs": ((0, 1 << 63),)}, "runs"),
        ({"runs": None}, "runs"),
    ],
)
def test_runs_that_make_no_sense(chain: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with SnapshotFile(str(chain)) as file:
        part = msgspec.structs.replace(file.header.ram[0], **change)
        head = snapshot_file.pack_head(msgspec.structs.replace(file.header, ram=(part,))) + file.state()
    path = tmp_path / "odd.pvsnap"
    path.write_bytes(head.ljust(part.offset, b"\0") + chain.read_bytes()[part.offset :])
    with pytest.raises(ImageError, match=says):
        SnapshotChain(str(path))


def frame(pages: int) -> bytes:
    return bytes(snapshot_zstd.zstd_library().ZstdCompressor().compress(bytes(pages * PAGE_SIZE)))


@pytest.mark.parametrize(
    "record",
    [
        struct.pack("<QII", 0, 1, len(frame(2))) + frame(2),
        struct.pack("<QII", 0, 1, len(frame(1 << 18))) + frame(1 << 18),  # a gigabyte in a few kilobytes
        struct.pack("<QII", 0, 257, len(frame(257))) + frame(257),
        struct.pack("<QII", 0, 0, 0),
        struct.pack("<QII", 16, 1, len(frame(1))) + frame(1),
        struct.pack("<QII", (1 << 64) - 1, 1, len(frame(1))) + frame(1),
        struct.pack("<QII", 0, 1, 1 << 31) + frame(1),
        struct.pack("<QII", 0, 1, len(frame(1)) + 1) + frame(1) + b"x",
        (struct.pack("<QII", 3, 1, len(frame(1))) + frame(1)) * 2,
        struct.pack("<QII", 0, 1, 4) + b"none",
        b"short",
    ],
)
def test_records_are_bounded_before_anything_is_decompressed(tmp_path: Path, record: bytes) -> None:
    path = tmp_path / "records"
    path.write_bytes(record)
    region = Region(0, 16 * PAGE_SIZE, "filled")
    try:
        with path.open("rb") as file, pytest.raises(ImageError, match="ram"):
            snapshot_zstd.read_compressed(str(path), file.fileno(), 0, len(record), region)
    finally:
        region.close()
