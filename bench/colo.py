"""COLO of the same bare-metal dirtier under pyvmm and under QEMU's microvm, both sides on this machine, taking turns.

For each number of pages that the guest writes each 100 ms, a checkpoint each 500 ms:

- ``pause``: for how long the primary's guest stands still for one, from its STOP event to its RESUME event.
- ``received``: from checkpoint-request to vmstate-received, at the primary: QEMU's by its trace, pyvmm's by
  query-colo-stats.
- ``told``: from x-colo-lost-heartbeat at the secondary to its COLO_EXIT event, the guest running on.
- ``killed``: from SIGKILL of the primary to the same; QEMU has nobody who would notice.
- ``memcpy``: one copy of those pages in this process, for the target of the pause.

``python bench/colo.py --table`` prints the README's table instead of JSON.
"""

from __future__ import annotations

import contextlib
import mmap
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import migration
from figures import document, figure, main, verdict
from migration import Monitor, wait_for

from pyvmm.errors import HostError

PAGES = (100, 1000, 4000, 16000)
MEMORY = 128
DELAY = 500
WATCHED = 4.0
"""Seconds that checkpoints are watched."""
ENTER = 15.0
"""Seconds to enter COLO; who has not by then never does."""
ROUNDS = 2
PATIENT = ("--heartbeat", "250", "--heartbeat-loss", "12")
"""A machine that is busy with four processes of both VMMs is no reason for a failover here; a death is seen at once."""
PAUSE_TARGET = {1000: 5.0, 4000: 10.0, 16000: 40.0}


class Watched(Monitor):
    """A monitor whose every event is kept, with its time in milliseconds."""

    def __init__(self, path: str, process: Any) -> None:
        self.seen: list[tuple[str, float]] = []
        super().__init__(path, process)

    def _read(self, what: str) -> Any:
        message = super()._read(what)
        if "event" in message:
            self.seen.append((message["event"], self._events[message["event"]]))
        return message

    def pauses(self) -> list[float]:
        """From each STOP to the RESUME behind it."""
        return [
            after[1] - before[1] for before, after in zip(self.seen, self.seen[1:], strict=False)
            if (before[0], after[0]) == ("STOP", "RESUME")
        ]  # fmt: skip


def command(vmm: str, folder: str, side: str, words: str) -> list[str]:
    """The command line of one side; the destination is the secondary."""
    made = _plain_command(vmm, folder, side, words)
    if vmm == "qemu":
        return [*made, "-trace", "colo_send_message", "-trace", "colo_receive_message", "-msg", "timestamp=on"]
    role = "secondary" if side == "to" else "primary"
    return [*made, "--colo", role, "--arbiter", f"file:{folder}/arbiter", "--colo-mode", "hybrid",
            "--checkpoint-delay", str(DELAY), *PATIENT]  # fmt: skip


_plain_command = migration.command
migration.command = command
migration.Monitor = Watched  # type: ignore[misc]
migration.MEMORY = MEMORY


@contextlib.contextmanager
def pair(vmm: str, pages: int) -> Iterator[tuple[Path, Any, Any] | None]:
    """(folder, primary, secondary) that make checkpoints; ``None`` if they never come to it."""
    words = f"pages={pages} period=100 rounds=0"
    with (
        tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder,
        migration.process(vmm, folder, "to", words) as secondary,
        migration.process(vmm, folder, "from", words) as primary,
    ):
        wait_for(Path(folder, "from.log"), b"round 3:")
        for side in (primary, secondary) if vmm == "qemu" else (primary,):
            side.execute("migrate-set-capabilities", capabilities=[{"capability": "x-colo", "state": True}])
        if vmm == "qemu":
            primary.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "x-checkpoint-delay": DELAY})
        primary.execute("migrate", uri=f"unix:{folder}/m")
        deadline = time.monotonic() + ENTER
        while primary.execute("query-migrate").get("status") != "colo":
            if time.monotonic() > deadline:
                yield None
                return
            time.sleep(0.02)
        time.sleep(2 * DELAY / 1000)
        yield Path(folder), primary, secondary


def watch(vmm: str, pages: int) -> dict[str, float] | None:
    """Milliseconds of one pair, ended by telling its secondary."""
    with pair(vmm, pages) as made:
        if made is None:
            return None
        folder, primary, secondary = made
        primary.seen.clear()
        time.sleep(WATCHED)
        primary.execute("query-status")
        pauses = primary.pauses()
        received = _received(vmm, folder, primary)
        told = time.time() * 1000
        secondary.execute("x-colo-lost-heartbeat")
        return {"pause": median(pauses), "received": received, "told": secondary.event("COLO_EXIT") - told}


def _received(vmm: str, folder: Path, primary: Any) -> float:
    if vmm == "pyvmm":
        return float(primary.execute("query-colo-stats")["received"]["median"])
    times, requested = [], None
    for line in (folder / "from.err").read_text().splitlines():
        stamp, _, rest = line.partition(":colo_")  # PID@SECONDS:colo_send_message Send '...' message
        if "'checkpoint-request'" in rest:
            requested = float(stamp.partition("@")[2]) * 1000
        elif "'vmstate-received'" in rest and requested is not None:
            times.append(float(stamp.partition("@")[2]) * 1000 - requested)
    return median(times)


def killed(pages: int) -> float:
    """Milliseconds from SIGKILL of pyvmm's primary to its secondary being the guest, the arbiter asked."""
    with pair("pyvmm", pages) as made:
        if made is None:
            raise HostError("not measured: pyvmm never came to a pair")
        _, primary, secondary = made
        at = time.time() * 1000
        primary.kill()
        return float(secondary.event("COLO_EXIT") - at)


def memcpy(pages: int) -> float:
    """Milliseconds for one copy of so many pages; the best of some."""
    size = pages * 4096
    with mmap.mmap(-1, size) as source, mmap.mmap(-1, size) as target:
        source[:], target[:] = b"x" * size, b"y" * size
        with memoryview(source) as out, memoryview(target) as into:
            best = 1e9
            for _ in range(7):
                began = time.perf_counter()
                into[:] = out
                best = min(best, time.perf_counter() - began)
    return best * 1000


def measure() -> dict[str, Any]:
    """All sizes."""
    if shutil.which("qemu-system-x86_64") is None:
        raise HostError("not measured: qemu-system-x86_64 is not installed (make packages)")
    figures: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    for pages in PAGES:
        turns = [(watch("pyvmm", pages), watch("qemu", pages)) for _ in range(ROUNDS)]
        copied = memcpy(pages)
        for name in ("pause", "received", "told"):
            ours = [turn[0][name] for turn in turns if turn[0] is not None]
            theirs = [turn[1][name] for turn in turns if turn[1] is not None]
            figures[f"{name}_{pages}"] = {
                "pyvmm": figure(ours, "ms"), "qemu": figure(theirs, "ms") if theirs else "never enters COLO",
            }  # fmt: skip
            if name == "pause":
                allowed = min(PAUSE_TARGET.get(pages, 1e9), 2.5 * copied + 2)
                targets[f"pause_{pages}"] = verdict(median(ours), allowed)
            elif name == "told":
                targets[f"told_{pages}"] = verdict(median(ours), 10.0)
            elif theirs:
                targets[f"received_{pages}"] = verdict(median(ours), median(theirs))
        figures[f"memcpy_{pages}"] = round(copied, 3)
    deaths = [killed(1000) for _ in range(3)]
    figures["killed_1000"] = {"pyvmm": figure(deaths, "ms")}
    targets["killed_1000"] = verdict(median(deaths), 50.0)
    return document(
        what=f"COLO of guests/dirtier with {MEMORY} MiB, so many pages each 100 ms, a checkpoint each {DELAY} ms",
        against="qemu-system-x86_64 -accel kvm -M microvm with x-colo, the same guest and period",
        figures=figures, ratio={}, target=targets,
    )  # fmt: skip


def table() -> str:
    """Markdown, for the README."""
    figures = measure()["figures"]

    def cell(key: str, vmm: str) -> str:
        value = figures[key].get(vmm, "-")
        return value if isinstance(value, str) else f"{_median(value):.1f} ms"

    def _median(value: Any) -> float:
        return float(value["median"] if isinstance(value, dict) else value.median)

    lines = ["| pages | pause | QEMU | request to received | QEMU | failover when told | QEMU | memcpy |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for pages in PAGES:
        cells = [cell(f"{name}_{pages}", vmm) for name in ("pause", "received", "told") for vmm in ("pyvmm", "qemu")]
        lines.append(f"| {pages} | " + " | ".join(cells) + f" | {figures[f'memcpy_{pages}']} ms |")
    lines.append(f"\nFrom SIGKILL of the primary, arbiter (a file) included: {cell('killed_1000', 'pyvmm')}.")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        print(table())
    else:
        main(measure)
