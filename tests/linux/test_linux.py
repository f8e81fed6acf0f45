"""An unmodified Linux, booted as a user boots it. Each boot takes its time here, so few tests ask much of one."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.processes import PYVMM, REPOSITORY, pyvmm
from tests.linux.conftest import BOOT_DEADLINE

pytestmark = [pytest.mark.linux, pytest.mark.timeout(BOOT_DEADLINE * 2 + 30)]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[bytes], dict[str, object]]:
    """One boot with two vCPUs that runs all the commands below."""
    report = tmp_path_factory.mktemp("linux") / "report.json"
    commands = [
        "uname -a; cat /proc/cpuinfo | head -5",
        "nproc; cat /sys/devices/system/clocksource/clocksource0/current_clocksource",
        "i=0; while [ $i -lt 100 ]; do echo line $i; i=$((i+1)); done",
        "printf 'no newline at the end'",
        "echo to stderr >&2; cat /nonexistent",
        # Not from /dev/urandom: a kernel that is emulated needs 20 s for half a MiB of it.
        "dd if=/bin/busybox of=/tmp/a bs=64k count=4 2>/dev/null; cp /tmp/a /tmp/b; cmp /tmp/a /tmp/b && echo same",
        "cat /sys/class/misc/hw_random/rng_current; head -c 4096 /dev/hwrng | wc -c",
        # The end of a session must not throw away what its terminal has not sent yet.
        r"head -c 3000 /dev/zero | tr '\0' x; exit 7",
    ]
    arguments = [word for command in commands for word in ("--exec", command)]
    done = pyvmm(
        "linux", "--smp", "2", "--rng", "--timeout", str(BOOT_DEADLINE), "--report", str(report), *arguments,
        timeout=BOOT_DEADLINE + 30,
    )  # fmt: skip
    return done, json.loads(report.read_text())


def test_a_64_bit_userland_printed_it(session: tuple[subprocess.CompletedProcess[bytes], dict[str, object]]) -> None:
    out = session[0].stdout.decode()
    assert re.search(r"^Linux \S+ 6\.12\.\d+\S* .* x86_64 ", out, re.M), out + session[0].stderr.decode()
    assert "processor\t: 0\nvendor_id\t: " in out


def test_two_cpus_and_the_clock_that_can_be_moved(
    session: tuple[subprocess.CompletedProcess[bytes], dict[str, object]],
) -> None:
    assert "\n2\nkvm-clock\n" in session[0].stdout.decode()


def test_the_entropy_device_serves_the_kernel(
    session: tuple[subprocess.CompletedProcess[bytes], dict[str, object]],
) -> None:
    assert "virtio_rng.0\n4096\n" in session[0].stdout.decode()


def test_output_is_complete_and_nothing_of_the_kernel_is_in_it(
    session: tuple[subprocess.CompletedProcess[bytes], dict[str, object]],
) -> None:
    out = session[0].stdout.decode()
    assert "".join(f"line {i}\n" for i in range(100)) + "no newline at the end" in out
    assert "pyvmm:" not in out
    assert "to stderr\n" in out
    assert "can't open '/nonexistent'" in out
    assert "same\n" in out
    assert out.endswith("x" * 3000), out[-100:]


def test_the_last_status_is_pyvmms(session: tuple[subprocess.CompletedProcess[bytes], dict[str, object]]) -> None:
    done, report = session
    assert done.returncode == 7
    assert (report["kind"], report["guest_value"]) == ("debug-exit", 7)


def test_a_reset_ends_it_with_no_reboot(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = pyvmm(
        "linux", "--fast", "--exec", "reboot -f", "--no-reboot", "--timeout", str(BOOT_DEADLINE),
        "--report", str(report), timeout=BOOT_DEADLINE + 30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(report.read_text())["kind"] == "reset"


@contextlib.contextmanager
def _terminal(*arguments: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [str(PYVMM), *arguments], stdin=slave, stdout=slave, stderr=slave, cwd=REPOSITORY, start_new_session=True
    )
    os.close(slave)
    try:
        yield master, process
    finally:
        process.kill()
        process.wait(10)
        os.close(master)


def _expect(master: int, wanted: str, deadline: float) -> str:
    seen = b""
    while wanted.encode() not in seen:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([master], [], [], max(0, left))
        assert ready, f"no {wanted!r} within the deadline; seen: {seen[-2000:]!r}"
        seen += os.read(master, 4096)
    return seen.decode(errors="replace")


def test_a_shell_on_the_terminal_then_a_reboot_then_poweroff() -> None:
    """One machine, from its snapshot and then booted: the reset restarts Linux in the same VMM."""
    with _terminal("linux", "--fast", "--timeout", str(2 * BOOT_DEADLINE)) as (master, process):
        for first, last in (("BusyBox", "reboot -f"), ("pyvmm: init", "poweroff -f")):
            deadline = time.monotonic() + BOOT_DEADLINE
            # The first life's last prompt is still to be read when the second one starts: wait for init's own line.
            _expect(master, first, deadline)
            _expect(master, "# ", deadline)
            os.write(master, b"echo $((6*7))-$((7*6))\n")
            _expect(master, "42-42", deadline)
            os.write(master, last.encode() + b"\n")
        assert process.wait(60) == 0
