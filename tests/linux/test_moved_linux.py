"""A Linux that moves while it boots and while programs run, and one that starts from a snapshot."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyvmm.arch.x86.linux_quirks import linux_additions
from pyvmm.cli.exec_console import exec_argument
from pyvmm.cli.machine_options import resolve_quirks
from pyvmm.machine.builder import build_machine, install_kick_signal
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import RngConfig
from pyvmm.machine.tiny_linux import cache_folder, find_initramfs, find_kernel
from tests.framework.moving import run_for, twin_of
from tests.framework.processes import pyvmm
from tests.linux.conftest import BOOT_DEADLINE

pytestmark = [pytest.mark.linux, pytest.mark.timeout(BOOT_DEADLINE * 3 + 60)]

WORK = (
    "dd if=/bin/busybox of=/tmp/a bs=64k count=4 2>/dev/null; cp /tmp/a /tmp/b; cmp /tmp/a /tmp/b && echo same;"
    " i=0; while [ $i -lt 40 ]; do echo line $i; i=$((i+1)); done; cat /proc/uptime; exit 3"
)
COMPLAINT = re.compile("^.*(?:WARNING: |BUG: |rcu.*stalls|lockup).*$", re.MULTILINE)
"""Of the kernel's, which is on the console, too. One is the lab's: QEMU's TCG does not intercept XSETBV, so KVM does
not see which size of the XSAVE area CPUID should tell."""
MOVES = 12


def test_linux_moves_while_it_boots_and_in_userland() -> None:
    install_kick_signal()
    quirks = resolve_quirks(None)
    config = MachineConfig(
        image=find_kernel(None), initrd=find_initramfs(None), append=exec_argument([WORK]), acpi=False, serial="null",
        linux_additions=" ".join(linux_additions(quirks, [], base=True, cards=False)), no_reboot=True,
        devices=(RngConfig(),),
    )  # fmt: skip
    output = bytearray()
    machine = build_machine(config, quirks)
    moves = moves_at_work = 0
    # A tenth of a boot, and some of the commands.
    while_booting, working = (2.0, 0.4) if "emulated-cpl0" in quirks else (0.15, 0.1)
    try:
        while True:
            assert moves < 500
            machine.backend.observe = output.extend
            at_work = b"pyvmm: command begin" in output
            while_moving = working if at_work else while_booting
            ending = run_for(machine, BOOT_DEADLINE if moves_at_work == MOVES else while_moving)
            if ending is not None:
                break
            twin = twin_of(machine)
            machine.close()
            machine = twin
            moves += 1
            moves_at_work += at_work
    finally:
        machine.close()
    text = output.decode(errors="replace").replace("\r\n", "\n")
    assert ending is not None and (ending.kind, ending.value) == ("debug-exit", 3), text[-3000:]
    complaints = [line for line in COMPLAINT.findall(text) if "fpu__init_system_xstate" not in line]
    assert not complaints, text[-3000:]
    assert "same\n" + "".join(f"line {i}\n" for i in range(40)) in text
    assert moves >= 4 and moves_at_work >= 1


@dataclass
class Damaged:
    """A start from a snapshot that is damaged, in a cache of its own, and what it said."""

    cache: Path
    began: float
    done: subprocess.CompletedProcess[bytes]


COMMAND = "head -c 16 /dev/urandom | od -An -tx1; date +%s; cut -d. -f1 /proc/uptime; exit 3"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Damaged:
    assert pyvmm("linux", "--fast", "--exec", "true", timeout=BOOT_DEADLINE).returncode == 0
    kept = max((cache_folder() / "fast").glob("*.pvsnap"), key=lambda path: path.stat().st_mtime)
    cache = tmp_path_factory.mktemp("cache")
    (cache / "fast").mkdir()
    snapshot = shutil.copy(kept, cache / "fast")
    with open(snapshot, "r+b") as file:
        file.seek(30)
        file.write(b"\xff" * 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYVMM_CACHE", str(cache))
        began = time.time()
        words = ("--timeout", str(BOOT_DEADLINE), "--exec", COMMAND)
        return Damaged(cache, began, pyvmm("linux", "--fast", *words, timeout=BOOT_DEADLINE + 30))


def test_a_damaged_snapshot_costs_a_boot_and_nothing_else(damaged: Damaged) -> None:
    assert damaged.done.returncode == 3
    assert b"boots anew" in damaged.done.stderr and b"CRC" in damaged.done.stderr
    with_card = pyvmm("linux", "--fast", "--net", "stream,unix:/x", "--exec", "true")
    assert with_card.returncode == 125


def test_a_linux_from_a_snapshot_runs_commands(damaged: Damaged, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first start keeps one, the others begin with it."""
    monkeypatch.setenv("PYVMM_CACHE", str(damaged.cache))
    began, done = damaged.began, damaged.done
    seen = []
    for _ in range(3):
        assert done.returncode == 3, done.stderr
        random, seconds, uptime = done.stdout.decode().splitlines()
        assert re.fullmatch(r"( [0-9a-f]{2}){16}", random)
        assert int(began) <= int(seconds) <= time.time() + 1, "the clock stands where the snapshot was taken"
        seen.append((random, int(uptime)))
        began = time.time()
        done = pyvmm("linux", "--fast", "--exec", COMMAND, timeout=BOOT_DEADLINE)
        assert not done.stderr
    assert len({random for random, _ in seen}) == 3, "they draw the same random numbers"
    assert len(list((damaged.cache / "fast").iterdir())) == 1
    for ending in ("exec sh -c 'exit 5'", "(exit 5)", "set -e; f() { return 5; }; f; true"):
        assert pyvmm("linux", "--fast", "--exec", ending, timeout=BOOT_DEADLINE).returncode == 5, ending
    killed = pyvmm("linux", "--fast", "--exec", "sleep 100 & echo shot; kill -9 $$", timeout=BOOT_DEADLINE)
    assert (killed.returncode, killed.stdout) == (128 + 9, b"shot\n")
    several = pyvmm("linux", "--fast", "--exec", "echo one", "--exec", "echo two; false", timeout=BOOT_DEADLINE)
    assert (several.returncode, several.stdout) == (1, b"one\ntwo\n")
