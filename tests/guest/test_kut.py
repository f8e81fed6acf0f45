"""Images in the format of kvm-unit-tests: the same lines and status under pyvmm and QEMU's TCG; ``pyvmm test``, the
shim and the pytest fixture with them.

The images must be built (``make guests``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import psutil
import pytest

from tests.framework.processes import REPOSITORY, pyvmm, refused

KUT = Path("guests/kut")
QEMU = shutil.which("qemu-system-x86_64")
SHIM = Path(sys.executable).with_name("pyvmm-qemu")

pytestmark = pytest.mark.guest


class Image(NamedTuple):
    name: str
    status: int
    """What the process ends with: ``(code << 1) | 1``."""
    lines: int
    """Verdicts among its lines."""
    flags: tuple[str, ...] = ()
    """As QEMU takes them."""


IMAGES = [
    Image("passes", 1, 8),
    Image("fails", 3, 4),
    Image("skips", 155, 1),
    Image("environ", 1, 6, ("-initrd", str(KUT / "environ.txt"))),
    Image("smp", 1, 3, ("-smp", "3")),
    Image("testdev", 1, 9),
    Image("protected32", 1, 2),
    Image("realmode", 1, 1),
]


def flags(image: Image) -> list[str]:
    """What a runner of such images gives to QEMU."""
    common = "-nodefaults -no-reboot -display none -serial stdio -device pc-testdev"
    debug_exit = ["-device", "isa-debug-exit,iobase=0xf4,iosize=0x4"]
    return [*common.split(), *debug_exit, "-kernel", str(KUT / f"{image.name}.flat"), *image.flags]


def finished(command: list[str], seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
    )


@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_under_the_shim(image: Image) -> None:
    done = finished([str(SHIM), "-machine", "accel=kvm", *flags(image)])
    assert done.stderr == "", "runners take any line there for a failure"
    assert done.returncode == image.status
    verdicts = [line for line in done.stdout.splitlines() if line.split(":")[0] in ("PASS", "FAIL", "SKIP", "XFAIL")]
    assert len(verdicts) == image.lines, done.stdout
    assert ("FAIL: " in done.stdout.replace("XFAIL: ", "")) == (image.name == "fails")


@pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed (it is not needed otherwise)")
@pytest.mark.parametrize("image", IMAGES, ids=lambda image: image.name)
def test_qemu_says_the_same_line_by_line(image: Image) -> None:
    ours = finished([str(SHIM), *flags(image)])
    theirs = finished([str(QEMU), "-accel", "tcg", "-machine", "pc", "-monitor", "none", *flags(image)])
    assert ours.stdout.splitlines() == theirs.stdout.splitlines()
    assert ours.returncode == theirs.returncode == image.status


def test_pyvmm_test_reads_the_suite_file_and_writes_junit(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    done = pyvmm("test", "--config", str(KUT / "unittests.cfg"), "--jobs", "2", "--junit", str(junit), timeout=180)
    text = done.stdout.decode()
    assert done.returncode == 0, text
    assert text.splitlines()[-1] == "7 images: 6 passed, 0 failed, 1 skipped; 30 tests in them"
    root = ElementTree.parse(junit).getroot()
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("37", "0", "0")
    failing = pyvmm("test", "--config", str(KUT / "unittests.cfg"), "kut-fails", timeout=60)
    assert failing.returncode == 1
    assert "FAIL kut-fails (4 tests): status 1, 1 unexpected failures" in failing.stdout.decode()
    assert "    FAIL: arithmetic: 2 + 2 = 5" in failing.stdout.decode().splitlines()


def test_pyvmm_test_as_tap() -> None:
    done = pyvmm("test", "--tap", *(str(KUT / f"{name}.flat") for name in ("fails", "protected32")))
    assert done.returncode == 1
    assert done.stdout.decode().splitlines() == [
        "TAP version 14",
        "# Subtest: fails",
        "    ok 1 - arithmetic: 2 + 2 = 4",
        "    not ok 2 - arithmetic: 2 + 2 = 5",
        "    not ok 3 - arithmetic: 1 / 3 is exact # TODO expected to fail",
        "    ok 4 - arithmetic: no FPU used # SKIP",
        "    1..4",
        "not ok 1 - fails",
        "# status 1, 1 unexpected failures",
        "# Subtest: protected32",
        "    ok 1 - pointers have 32 bits",
        "    ok 2 - protection on, paging off",
        "    1..2",
        "ok 2 - protected32",
        "1..2",
    ]


def endless(folder: Path) -> Path:
    """A boot sector that jumps to itself."""
    image = folder / "endless.bin"
    image.write_bytes((b"\xeb\xfe" + bytes(508) + b"\x55\xaa").ljust(512))
    return image


def test_an_image_that_hangs_one_that_crashes_and_one_that_is_none(tmp_path: Path) -> None:
    text_file = tmp_path / "text.flat"
    text_file.write_text("no image\n")
    images = [str(endless(tmp_path)), "guests/triple-fault/triple-fault.elf", "guests/hello/hello.bin", str(text_file)]
    done = pyvmm("test", "--timeout", "2", *images)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 1, lines
    assert lines[0].startswith("FAIL (timeout) endless: the guest did not end within 2 s")
    heads = [line for line in lines if line.startswith("FAIL")]
    assert "triple-fault: ended without an exit status" in heads[1]
    assert "hello: ended without an exit status" in heads[2]
    assert heads[3].startswith("FAIL (refused) text") and "magic" in heads[3]


def test_pyvmm_test_refuses_bad_options() -> None:
    assert "no such file" in refused("test", "/no/such.flat")
    assert "name images" in refused("test")
    assert "--timeout" in refused("test", str(KUT / "passes.flat"), "--timeout", "0")
    assert "--jobs" in refused("test", str(KUT / "passes.flat"), "--jobs", "x")
    assert "--junit" in refused("test", str(KUT / "passes.flat"), "--junit", "/no/such/folder/x.xml")
    assert "neither a test" in refused("test", "--config", str(KUT / "unittests.cfg"), "nothing")


@pytest.mark.parametrize("number", [2, 15])
def test_an_interrupted_run_ends_its_images(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pyvmm", "test", str(endless(tmp_path)), "--timeout", "60"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    children: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 20
        while not children and time.monotonic() < deadline:
            time.sleep(0.1)
            children = psutil.Process(process.pid).children()
        assert children
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode == 130
        assert not any(child.is_running() for child in children)
    finally:
        process.kill()
        process.communicate()


PROJECT = """
import pytest

def test_it_passes(vm):
    guest = vm("{kut}/testdev.flat", "--debug-exit", "0xf4,4", devices=["testdev"])
    assert guest.expect(r"PASS: latch: (\\d+) bits").group(1) == "32"
    guest.expect("SUMMARY: 9 tests")
    assert guest.exit_status == 1
    report = guest.report()
    assert len(report.cases) == 9 and not report.failed

def test_several_and_one_that_would_run_on(vm, tmp_path):
    vm("{kut}/passes.flat").expect("page 0 is writable")
    guest = vm("{endless}", memory="2M", timeout=120)
    print("PID", guest.pid)
    assert guest.running
    with pytest.raises(AssertionError, match="did not come"):
        guest.expect("never", timeout=0.5)

def test_what_did_not_come_is_told(vm):
    vm("{kut}/skips.flat").expect("PASS: miracles")

def test_refusals_are_told(vm):
    guest = vm("/no/such/image")
    assert guest.exit_status == 125
    assert "no such file" in guest.errors
"""


def test_another_projects_tests_use_the_fixture(tmp_path: Path) -> None:
    """With nothing but pyvmm installed: no conftest, no option."""
    images = {"kut": REPOSITORY / KUT, "endless": endless(tmp_path)}
    (tmp_path / "test_it.py").write_text(PROJECT.replace("{kut}", str(images["kut"])).replace(
        "{endless}", str(images["endless"])))  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "the guest ended and 'PASS: miracles' did not come, but" in done.stdout
    pid = int(done.stdout.partition("PID ")[2].split()[0])
    assert not psutil.pid_exists(pid)


def test_the_fixture_types_at_the_guest(tmp_path: Path) -> None:
    """Input goes through: an image that echoes serial bytes and ends with what a 'q' gives."""
    from pyvmm.testing.guest_process import GuestProcess

    # mov dx,0x3fd; in al,dx; test al,1; jz -5; mov dx,0x3f8; in al,dx; out dx,al; cmp al,'q'; jne start; out 0xf4,al
    code = bytes.fromhex("bafd03 ec a801 74fb baf803 ec ee 3c71 75ef e6f4 f4".replace(" ", ""))
    image = tmp_path / "echo.bin"
    image.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa")
    with GuestProcess([str(image), "--memory", "2M"], timeout=60) as guest:
        guest.send("hello, ")
        guest.expect("hello, ")
        guest.send(b"world q")
        guest.expect("world q")
        assert guest.exit_status == (0x71 << 1 | 1) & 0xFF
        assert guest.output == "hello, world q"
        with pytest.raises(AssertionError, match="has ended"):
            for _ in range(100):
                guest.send("x" * 4096)
    assert not guest.running


def test_the_plugin_costs_nothing_until_it_is_used() -> None:
    probe = "import sys, pyvmm.testing.pytest_plugin; print(*[m for m in sys.modules if m.startswith('pyvmm')])"
    done = finished([sys.executable, "-c", probe])
    assert done.stdout.split() == ["pyvmm", "pyvmm.testing", "pyvmm.testing.pytest_plugin"]
