"""ACPI tables: structure and checksums here, meaning by ACPICA's own iasl and acpiexec."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86 import layout
from pyvmm.arch.x86.boot import acpi, aml
from pyvmm.devices import acpi_pm
from pyvmm.errors import ConfigError
from pyvmm.memory.guest_memory import GuestMemory

DEVICES = (
    aml.virtio_mmio_device(0, layout.VIRTIO_MMIO, layout.VIRTIO_MMIO_SIZE, 10),
    aml.virtio_mmio_device(17, layout.VIRTIO_MMIO + 0x1000, layout.VIRTIO_MMIO_SIZE, 11, level=True),
    aml.device("COM1", aml.name("_HID", aml.eisa_id("PNP0501")), aml.name("_UID", aml.integer(1))),
)


def read_table(memory: GuestMemory, gpa: int) -> bytes:
    raw = memory.read(gpa, memory.read_uint(gpa + 4, 4))
    assert sum(raw) & 0xFF == 0, raw[:4]
    return raw


def tables(memory: GuestMemory) -> dict[bytes, bytes]:
    """All tables, found the way a kernel finds them."""
    rsdp = memory.read(layout.ACPI_TABLES, 36)
    assert rsdp[:8] == b"RSD PTR " and rsdp[15] == 2
    assert sum(rsdp[:20]) & 0xFF == 0 and sum(rsdp) & 0xFF == 0
    xsdt = read_table(memory, struct.unpack_from("<Q", rsdp, 24)[0])
    found = {b"XSDT": xsdt}
    for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]):
        raw = read_table(memory, gpa)
        found[raw[:4]] = raw
    fadt = found[b"FACP"]
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert struct.unpack_from("<QQ", fadt, 132) == (0, dsdt)
    found[b"DSDT"] = read_table(memory, dsdt)
    assert facs % 64 == 0
    found[b"FACS"] = memory.read(facs, 64)
    return found


def test_chain_and_fixed_hardware(memory: GuestMemory) -> None:
    acpi.write_acpi(memory, 2)
    found = tables(memory)
    assert set(found) == {b"XSDT", b"FACP", b"APIC", b"DSDT", b"FACS"}
    fadt = found[b"FACP"]
    port = layout.PORT_ACPI_PM[0]
    assert struct.unpack_from("<H", fadt, 46) == (9,)
    assert struct.unpack_from("<I", fadt, 48) == (0,), "SMI_CMD: always in ACPI mode"
    assert struct.unpack_from("<I4xI", fadt, 56) == (port, port + 4)
    assert tuple(fadt[88:90]) == (4, 2)
    flags = struct.unpack_from("<I", fadt, 112)[0]
    assert flags & 1 << 10 and not flags & 1 << 4 and not flags & 1 << 20, "reset, power button, full hardware"
    assert struct.unpack_from("<BBBBQ", fadt, 116) == (1, 8, 0, 1, 0xCF9) and fadt[128] == 6
    assert found[b"FACS"][:8] == b"FACS" + struct.pack("<I", 64)


def test_sleep_type_is_the_one_the_device_acts_on() -> None:
    assert acpi.S5_SLEEP_TYPE == acpi_pm.S5_SLEEP_TYPE


@pytest.mark.parametrize("cpus", [1, 4, 254])
def test_madt(memory: GuestMemory, cpus: int) -> None:
    acpi.write_acpi(memory, cpus)
    madt = tables(memory)[b"APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 1)
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert [(e[2], e[3], e[4]) for e in entries if e[0] == 0] == [(n, n, 1) for n in range(cpus)]
    assert [struct.unpack("<BBBBII", e)[4:] for e in entries if e[0] == 1] == [(0xFEC00000, 0)]
    overrides = {struct.unpack("<BBBBIH", e)[3:] for e in entries if e[0] == 2}
    assert overrides == {(0, 2, 0x5), (9, 9, 0xD)}
    assert [struct.unpack("<BBBHB", e)[2:] for e in entries if e[0] == 4] == [(0xFF, 0, 1)]


@pytest.mark.parametrize("cpus", [0, 255])
def test_cpus_out_of_range(memory: GuestMemory, cpus: int) -> None:
    with pytest.raises(ConfigError, match=f"--smp {cpus}"):
        acpi.write_acpi(memory, cpus)


def test_tables_that_outgrow_their_area() -> None:
    with pytest.raises(ConfigError, match="more than their area has"):
        acpi.build_acpi(1, [bytes(200_000)])


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    return text


def test_iasl_disassembles_every_table_and_compiles_it_again(memory: GuestMemory, tmp_path: Path) -> None:
    acpi.write_acpi(memory, 2, DEVICES)
    for signature, raw in tables(memory).items():
        name = signature.decode().lower()
        (tmp_path / f"{name}.aml").write_bytes(raw)
        text = run("iasl", "-d", f"{name}.aml", cwd=tmp_path)
        source = (tmp_path / f"{name}.dsl").read_text()
        for bad in ("Error", "Warning", "Invalid", "Unknown", "Incorrect"):
            assert bad not in text and bad not in source.replace("Error Register", ""), (name, bad, text)
        again = run("iasl", "-f", "-p", f"{name}2", f"{name}.dsl", cwd=tmp_path)
        assert "0 Errors, 0 Warnings" in again or "Error" not in again, again
    dsdt = (tmp_path / "dsdt.dsl").read_text()
    assert dsdt.count('"LNRO0005"') == 2 and 'EisaId ("PNP0501")' in dsdt
    assert re.search(r"0xD0001000,\s+// Address Base\s+0x00001000", dsdt)
    compiled = (tmp_path / "dsdt2.aml").read_bytes()
    assert compiled[36:] == tables(memory)[b"DSDT"][36:], "iasl encodes the same terms to the same bytes"


def test_acpiexec_evaluates_s5(memory: GuestMemory, tmp_path: Path) -> None:
    acpi.write_acpi(memory, 2, DEVICES)
    (tmp_path / "dsdt.aml").write_bytes(tables(memory)[b"DSDT"])
    text = run("acpiexec", "-b", r"evaluate \_S5; evaluate \_SB.VR11._UID", "dsdt.aml", cwd=tmp_path)
    values = re.findall(r"\[Integer\] = ([0-9A-F]{16})", text)
    assert [int(v, 16) for v in values] == [5, 5, 0, 0, 17], text
    assert "AE_" not in text, text


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300) | st.integers(4000, 5000) | st.integers(1 << 20, (1 << 20) + 99))
def test_package_length_round_trip(size: int) -> None:
    raw = aml.with_length(bytes(size))
    extra = raw[0] >> 6
    length = raw[0] & 0x3F if extra == 0 else raw[0] & 0xF | int.from_bytes(raw[1 : 1 + extra], "little") << 4
    assert length == len(raw)
    if extra:
        assert not raw[0] & 0x30


@pytest.mark.parametrize("path", ["", "a", "TOOLONG", "A..B", "1ABC", "_SB.x"])
def test_bad_names(path: str) -> None:
    if path == "":
        assert aml.name_path(path) == b"\0"
        return
    with pytest.raises(ValueError, match="not an ACPI name"):
        aml.name_path(path)


def test_integers_are_as_short_as_they_can_be() -> None:
    lengths = {0: 1, 1: 1, 2: 2, 0xFF: 2, 0x100: 3, 0xFFFF: 3, 0x10000: 5, 0xFFFFFFFF: 5, 1 << 32: 9}
    assert {value: len(aml.integer(value)) for value in lengths} == lengths
    for value in (-1, 1 << 64):
        with pytest.raises(ValueError, match="unsigned 64-bit"):
            aml.integer(value)
