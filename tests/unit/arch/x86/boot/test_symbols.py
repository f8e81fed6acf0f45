"""Symbols: real ones by the toolchain, none from damaged files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.arch.x86.boot.symbols import SymbolTable, read_symbols

SOURCE = """
.globl _start, second
.type second, @function
_start: nop
  nop
second: hlt
  hlt
.size second, . - second
  nop
"""


@pytest.fixture(scope="module", params=[32, 64])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("symbols")
    (folder / "a.S").write_text(SOURCE)
    machine = {32: "elf_i386", 64: "elf_x86_64"}[request.param]
    subprocess.run(["as", f"--{request.param}", "-o", "a.o", "a.S"], cwd=folder, check=True, timeout=60)
    subprocess.run(
        ["ld", "-m", machine, "-Ttext=0x100000", "-o", "a.elf", "a.o"], cwd=folder, check=True, timeout=60
    )
    return folder / "a.elf"


def test_lookup(program: Path) -> None:
    table = read_symbols(str(program))
    assert table.address("_start") == 0x100000 and table.address("none") is None
    assert table.lookup(0x100001) == ("_start", 1)
    assert table.lookup(0x100003) == ("second", 1)
    assert table.lookup(0x100004) is None, "behind a symbol whose size is known"
    assert table.lookup(0xFFFFF) is None


def test_no_symbols(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert len(read_symbols(str(path))) == 0
    path.write_bytes(b"\x7fELF")
    assert len(read_symbols(str(path))) == 0
    assert SymbolTable([]).lookup(5) is None


@settings(max_examples=100, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 1 << 20), noise=st.binary(min_size=1, max_size=8), from_end=st.booleans())
def test_damaged_files_give_fewer_symbols_and_no_error(
    program: Path, tmp_path: Path, at: int, noise: bytes, from_end: bool
) -> None:
    data = bytearray(program.read_bytes())
    spot = len(data) - 1 - at % 1024 if from_end else at % 128
    data[spot : spot + len(noise)] = noise
    path = tmp_path / "damaged"
    path.write_bytes(data)
    assert len(read_symbols(str(path))) < 1000
