"""Every teaching guest, run as a user runs it: by its folder, as a process, on this host's /dev/kvm.

The images must be built (``make guests``); a missing one fails, it is not skipped.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pyvmm.machine.guest_catalog import AnyOrder, GuestEntry, describe_mismatch, load_catalog

GUESTS = Path(__file__).parents[2] / "guests"
CATALOG = load_catalog(GUESTS / "guests.toml")
ENTRIES = [pytest.param(entry, id=name) for name, entry in CATALOG.items()]

PYVMM = Path(sys.executable).with_name("pyvmm")
"""The console script of the environment that runs the tests."""

HOW_IT_ENDS = {0: "halt", 126: "triple-fault"}
"""The report's ``kind`` for a status; every other status a guest asks for is a debug exit."""


QEMU_IDT_ERROR_CODE = ("CPL 3, error code 0xe2", "CPL 3, error code 0x72")
"""INT 14 refused: older TCGs count IDT entries by their 16 bytes in the error code, CPUs (this was tried on
one) by their number as SDM vol. 3A, "Error Code", has it."""

ON_QEMU_S_CPU = os.environ.get("PYVMM_IN_LAB") == "1"
"""The host's CPU is QEMU's TCG: what a guest sees of CPUs is what that makes of them, KVM or not."""


def pyvmm_run(entry: GuestEntry, report: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """``pyvmm run`` the entry's folder; a variant says on the command line how it differs from it."""
    command = [str(PYVMM), "run", str(entry.image.parent), "--report", str(report)]
    if entry.is_variant:
        command += ["--memory", entry.memory, "--smp", str(entry.cpus), "--append", entry.append]
        command += ["--timeout", str(entry.timeout)]
    return subprocess.run(
        [*command, *options],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=entry.timeout + 20,
    )


@pytest.mark.kvm
@pytest.mark.guest
@pytest.mark.parametrize("entry", ENTRIES)
def test_a_guest_prints_what_the_catalog_says_and_ends_with_its_status(entry: GuestEntry, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = pyvmm_run(entry, report)
    output = done.stdout.replace(*QEMU_IDT_ERROR_CODE) if ON_QEMU_S_CPU else done.stdout
    assert describe_mismatch(entry.expected, output) is None, done.stdout + done.stderr
    assert done.returncode == entry.status, done.stderr
    said = json.loads(report.read_text())
    assert said["status"] == entry.status
    assert said["kind"] == HOW_IT_ENDS.get(entry.status, "debug-exit")
    assert len(said["statistics"]["cpus"]) == entry.cpus


@pytest.mark.kvm
@pytest.mark.guest
def test_the_dirtier_runs_until_it_is_told_to_stop(tmp_path: Path) -> None:
    """``rounds=0`` has no end of its own; a deadline ends it, and it was writing all the time."""
    entry = CATALOG["dirtier"]
    report = tmp_path / "report.json"
    done = pyvmm_run(entry, report, "--append", "rounds=0 period=50", "--timeout", "3")
    assert done.returncode == 124, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "256 pages every 50 ms, for ever"
    assert "done" not in lines
    # 60 periods of 50 ms fit into 3 s; start-up and a busy host take their part of it.
    assert len(lines) > 15
    for number, line in enumerate(lines[1:-1], start=1):  # the last may be cut
        assert line.startswith(f"round {number}: 256 pages in ")


@pytest.mark.kvm
@pytest.mark.guest
@pytest.mark.parametrize("append", ["pages=", "pages=12x", "rounds=1234567890", "period=0", "period=10001", "pages=0"])
def test_the_dirtier_refuses_options_it_cannot_follow(append: str, tmp_path: Path) -> None:
    done = pyvmm_run(CATALOG["dirtier"], tmp_path / "report.json", "--append", append)
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout.startswith("dirtier: ")


# -- the same guests under an implementation that shares nothing with pyvmm

QEMU = shutil.which("qemu-system-x86_64")


def qemu_command(entry: GuestEntry) -> list[str]:
    assert QEMU is not None
    command = [QEMU, "-accel", "tcg", "-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot"]
    command += ["-nodefaults", "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
    # Its firmware lists only the first thread of each socket in the MP table.
    command += ["-smp", f"{entry.cpus},sockets={entry.cpus}"]
    if entry.image.suffix == ".bin":
        # As a boot sector. The firmware that loads it needs more memory than the guest.
        return [*command, "-m", "32M", "-drive", f"file={entry.image},format=raw,if=floppy,readonly=on"]
    return [*command, "-m", entry.memory, "-kernel", str(entry.image), "-append", entry.append]


@pytest.mark.guest
@pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed (it is not needed otherwise)")
@pytest.mark.parametrize("entry", ENTRIES)
def test_qemu_agrees(entry: GuestEntry) -> None:
    """The guests are right about x86, not just right on pyvmm. QEMU does not end where all CPUs halt, so it
    is ended here once every expected line has come; that nothing follows is the other test's part."""
    wanted = sum(len(item.any_order) if isinstance(item, AnyOrder) else 1 for item in entry.expected)
    process = subprocess.Popen(
        qemu_command(entry), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = threading.Timer(60, process.kill)
    deadline.start()
    try:
        assert process.stdout is not None
        output = "".join(itertools.islice(process.stdout, wanted))
        output = output.replace(*QEMU_IDT_ERROR_CODE)
        assert describe_mismatch(entry.expected, output) is None, output
        if entry.status % 2:
            assert process.wait() == entry.status
    finally:
        deadline.cancel()
        deadline.join(10)
        process.kill()
        process.communicate()
