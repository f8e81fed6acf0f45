"""``--sandbox on``: machines that run, report, crash and have disks under it; and who is confined by default."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from tests.framework.processes import Running, pyvmm
from tests.framework.real_mode import HLT_FOREVER, SPIN, TRIPLE_FAULT, image, out8, text

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize(
    ("code", "options", "status"),
    [
        (text(b"hi") + HLT_FOREVER, [], 0),
        (text(b"hi") + out8(0xF4, 0x10), [], 33),
        (text(b"hi") + SPIN, ["--timeout", "0.5"], 124),
        (text(b"hi") + TRIPLE_FAULT, [], 126),  # disassembly is imported under the filter
        (text(b"hi") + HLT_FOREVER, ["--balloon", "--rng", "--smp", "2"], 0),
        (text(b"hi") + HLT_FOREVER, ["--trace", "vcpu_*,file={tmp}/t.json,format=chrome"], 0),
        (text(b"hi") + HLT_FOREVER, ["--disk", "{tmp}/disk.img", "--qmp", "unix:{tmp}/q"], 0),
    ],
)
def test_a_machine_ends_as_without_it(tmp_path: Path, code: bytes, options: list[str], status: int) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    report = tmp_path / "report"
    words = [word.format(tmp=tmp_path) for word in options]
    done = pyvmm("run", image(tmp_path, code), "--sandbox", "on", "--report", str(report), *words)
    assert (done.returncode, done.stdout) == (status, b"hi"), done.stderr
    assert json.loads(report.read_text())["status"] == status


def confinement(process: Running) -> dict[str, set[str]]:
    """What the kernel says of ``process``'s threads, once its guest has spoken."""
    assert process.process.stdout is not None
    assert process.process.stdout.read(2) == b"hi"
    time.sleep(0.2)
    found: dict[str, set[str]] = {}
    for status in Path(f"/proc/{process.process.pid}/task").glob("*/status"):
        wanted = r"^(Seccomp|NoNewPrivs|CapEff|CapPrm|CapInh):\s+(\w+)$"
        for name, value in re.findall(wanted, status.read_text(), re.M):
            found.setdefault(name, set()).add(value)
    return found


@pytest.mark.parametrize("chosen", ["on", "off", "auto"])
def test_every_thread_of_a_running_machine_is_confined_or_none(tmp_path: Path, chosen: str) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    path = image(tmp_path, text(b"hi") + SPIN)
    with Running("run", path, "--sandbox", chosen, "--smp", "2", "--disk", f"{tmp_path}/disk.img") as process:
        found = confinement(process)
        assert found["Seccomp"] == ({"2"} if chosen == "on" else {"0"})
        if chosen == "on":
            assert found["NoNewPrivs"] == {"1"}
            assert {*found["CapEff"], *found["CapPrm"], *found["CapInh"]} == {"0" * 16}


def test_with_colo_it_is_on_by_default(tmp_path: Path) -> None:
    path = image(tmp_path, text(b"hi") + SPIN)
    with Running("run", path, "--colo", "primary", "--arbiter", "none") as process:
        assert confinement(process)["Seccomp"] == {"2"}


def test_a_guest_moves_between_two_that_are_confined(tmp_path: Path) -> None:
    uri = f"unix:{tmp_path}/m"
    path = image(tmp_path, text(b"hi") + SPIN)
    common = ("run", path, "--sandbox", "on", "--qmp")
    with (
        Running(*common, f"unix:{tmp_path}/b", "--incoming", uri) as target,
        Running(*common, f"unix:{tmp_path}/a") as source,
    ):
        assert confinement(source)["Seccomp"] == {"2"}
        moved = pyvmm("migrate", f"unix:{tmp_path}/a", uri)
        assert moved.returncode == 0, moved.stderr
        assert target.process.poll() is None
        found = {
            line.split()[1]
            for status in Path(f"/proc/{target.process.pid}/task").glob("*/status")
            for line in status.read_text().splitlines()
            if line.startswith("Seccomp:")
        }
        assert found == {"2"}
