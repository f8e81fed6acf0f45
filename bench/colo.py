"""COLO of the same bare-metal dirtier under pyvmm and under QEMU's microvm, both sides on this machine, taking turns.

For each number of pages that the guest writes each 100 ms, a checkpoint each 500 ms:

- ``pause``: for how long the primary's guest stands still for one, from its STOP event to its RESUME event.
- ``received``: from checkpoint-request to vmstate-received, at the primary: QEMU's by its trace, pyvmm's by
  query-colo-stats.
- ``told``: from x-colo-lost-heartbeat at the secondary to its COLO_EXIT event, which comes when the guest runs.
- ``memcpy``: one copy of those pages, out of caches, in this process, for the target of the pause.

Of pyvmm alone, because QEMU has nobody who would notice, or the guest has no figure for it:

- ``killed``, ``silent``: from SIGKILL, or SIGSTOP, of the primary to the secondary's COLO_EXIT, the arbiter (a file;
  for ``killed_etcd`` etcd) asked and the guest running.
- ``resident``: all of the secondary's process (PSS), against 1.1 times the guest's memory plus what its replica wrote
  since the checkpoint plus one incoming checkpoint.
- ``throughput``: rounds of a guest that writes 1,000 pages a second and computes for half of the time, against the same
  unprotected.
- ``cpu``: what both processes need for one checkpoint, beyond what the guest takes in either.

``python bench/colo.py --table`` prints the README's tables instead of JSON.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import migration
import msgspec
import psutil
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
ROUNDS = 4
DEATHS = 5
WORK = 150_000
"""Thousands of turns of an empty loop in 100 ms: about half of a CPU."""
PATIENT = ("--heartbeat", "250", "--heartbeat-loss", "12")
"""A machine that is busy with four processes of both VMMs is no reason for a failover here; a death is seen at once."""
PAUSE_TARGET = {1000: 5.0, 4000: 10.0, 16000: 40.0}


class Watched(Monitor):
    """A monitor whose every event is kept, with its time in milliseconds."""

    def __init__(self, path: str, process: Any) -> None:
        self.seen: list[tuple[str, float]] = []
        self.pid: int = process.pid
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


class How(msgspec.Struct, frozen=True):
    """How pyvmm's sides are to be started."""

    mode: str = "hybrid"
    delay: int = DELAY
    arbiter: str = ""
    """Empty: a file."""
    patient: bool = True
    alone: bool = False


_how = [How()]


def command(vmm: str, folder: str, side: str, words: str) -> list[str]:
    """The command line of one side; the destination is the secondary."""
    made = _plain_command(vmm, folder, side, words)
    how = _how[-1]
    if vmm == "qemu":
        return [*made, "-trace", "colo_send_message", "-trace", "colo_receive_message", "-msg", "timestamp=on"]
    if how.alone:
        return made
    role = "secondary" if side == "to" else "primary"
    return [*made, "--colo", role, "--arbiter", how.arbiter or f"file:{folder}/arbiter", "--colo-mode", how.mode,
            "--checkpoint-delay", str(how.delay), *(PATIENT if how.patient else ())]  # fmt: skip


_plain_command = migration.command
migration.command = command
migration.Monitor = Watched  # type: ignore[misc]
migration.MEMORY = MEMORY


@contextlib.contextmanager
def pair(vmm: str, pages: int, how: How | None = None, work: int = 0) -> Iterator[tuple[Path, Any, Any] | None]:
    """(folder, primary, secondary) that make checkpoints; ``None`` if they never come to it."""
    words = f"pages={pages} period=100 rounds=0" + (f" work={work}" if work else "")
    _how.append(how or How())
    with (
        contextlib.ExitStack() as undo,
        tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder,
        migration.process(vmm, folder, "to", words) as secondary,
        migration.process(vmm, folder, "from", words) as primary,
    ):
        undo.callback(_how.pop)
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


@contextlib.contextmanager
def protected(pages: int, how: How, work: int = 0) -> Iterator[tuple[Path, Any, Any]]:
    """pyvmm's pair; HostError if it never becomes one."""
    with pair("pyvmm", pages, how, work) as made:
        if made is None:
            raise HostError("not measured: pyvmm never came to a pair")
        yield made


def lost(signal_: int, arbiter: str = "") -> float:
    """Milliseconds from ``signal_`` to pyvmm's primary until its secondary is the guest."""
    with protected(1000, How(arbiter=arbiter, patient=False)) as (_, primary, secondary):
        at = time.time() * 1000
        os.kill(primary.pid, signal_)
        return float(secondary.event("COLO_EXIT") - at)


@contextlib.contextmanager
def etcd() -> Iterator[str]:
    """What --arbiter is to be told of a server of its own. HostError if there is none."""
    program = shutil.which("etcd")
    if program is None:
        raise HostError("not measured: etcd is not installed (make packages)")
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        clients, peers = (f"127.0.0.1:{probe.getsockname()[1]}" for probe in (one, two))
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        server = subprocess.Popen(
            [program, "--data-dir", folder, "--listen-client-urls", f"http://{clients}", "--advertise-client-urls",
             f"http://{clients}", "--listen-peer-urls", f"http://{peers}", "--initial-advertise-peer-urls",
             f"http://{peers}", "--initial-cluster", f"default=http://{peers}"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            host, _, port = clients.partition(":")
            deadline = time.monotonic() + 10
            while True:
                with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                    break
                if time.monotonic() > deadline:
                    raise HostError("not measured: etcd does not answer")
                time.sleep(0.05)
            yield f"etcd:{clients}"
        finally:
            server.kill()
            server.wait(10)


def _rounds(folder: Path) -> int:
    return (folder / "from.log").read_bytes().count(b"round ")


def throughput(how: How) -> float:
    """Rounds a second of the guest that computes."""
    with contextlib.ExitStack() as stack:
        if how.alone:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyvmm-bench-")))
            _how.append(how)
            stack.callback(_how.pop)
            stack.enter_context(
                migration.process("pyvmm", str(folder), "from", f"pages=100 period=100 rounds=0 work={WORK}")
            )
            wait_for(folder / "from.log", b"round 5:")
        else:
            folder = stack.enter_context(protected(100, how, WORK))[0]
        before, began = _rounds(folder), time.monotonic()
        time.sleep(2 * WATCHED)
        return (_rounds(folder) - before) / (time.monotonic() - began)


def _cpu(*pids: int) -> float:
    return sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def cpu_of_checkpoints(pages: int) -> float:
    """CPU milliseconds of both processes for one, beyond what they take without any."""
    with protected(pages, How(delay=60_000)) as (_, primary, secondary):
        begun = _cpu(primary.pid, secondary.pid)
        time.sleep(WATCHED)
        idle = _cpu(primary.pid, secondary.pid) - begun
        primary.execute("migrate-set-parameters", **{"x-checkpoint-delay": 100})
        primary.execute("colo-checkpoint-now")
        begun, before = _cpu(primary.pid, secondary.pid), primary.execute("query-colo-stats")["checkpoints"]
        time.sleep(WATCHED)
        used = _cpu(primary.pid, secondary.pid) - begun
        return 1000 * (used - idle) / (primary.execute("query-colo-stats")["checkpoints"] - before)


def resident(pages: int) -> dict[str, float]:
    """MiB of the secondary's memory while it is protected, and what it may be."""
    with protected(pages, How()) as (_, primary, secondary):
        most = 0.0
        until = time.monotonic() + WATCHED
        while time.monotonic() < until:
            rollup = Path(f"/proc/{secondary.pid}/smaps_rollup").read_text()
            kib = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            most = max(most, kib / 1024)
            time.sleep(0.02)
        checkpoint = primary.execute("query-colo-stats")["size"] / (1 << 20)
    allowed = 1.1 * MEMORY + pages * 4096 / (1 << 20) + checkpoint
    return {"seen": most, "allowed": allowed}


def memcpy(pages: int) -> float:
    """Milliseconds for one copy of so many pages of a guest's memory that is not in any cache; median of some."""
    size, memory = pages * 4096, MEMORY << 20
    with mmap.mmap(-1, memory) as source, mmap.mmap(-1, size) as target:
        source[:], target[:] = b"x" * memory, b"y" * size
        with memoryview(source) as out, memoryview(target) as into:
            times = []
            for _ in range(7):
                source[:] = b"z" * memory  # all of it has been in caches since, and so none is
                began = time.perf_counter()
                into[:] = out[:size]
                times.append(time.perf_counter() - began)
    return median(times) * 1000


def measure() -> dict[str, Any]:
    """All sizes."""
    if shutil.which("qemu-system-x86_64") is None:
        raise HostError("not measured: qemu-system-x86_64 is not installed (make packages)")
    figures: dict[str, Any] = {}
    targets: dict[str, Any] = {}
    for pages in PAGES:
        turns = []
        for number in range(ROUNDS):
            vmms = ("pyvmm", "qemu") if number % 2 else ("qemu", "pyvmm")
            turn = {vmm: watch(vmm, pages) for vmm in vmms}
            turns.append((turn["pyvmm"], turn["qemu"]))
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
    _measure_alone(figures, targets)
    return document(
        what=f"COLO of guests/dirtier with {MEMORY} MiB, so many pages each 100 ms, a checkpoint each {DELAY} ms",
        against="qemu-system-x86_64 -accel kvm -M microvm with x-colo, the same guest and period",
        figures=figures, ratio={}, target=targets,
    )  # fmt: skip


def _measure_alone(figures: dict[str, Any], targets: dict[str, Any]) -> None:
    def note(name: str, values: list[float], unit: str, most: float) -> None:
        figures[name] = {"pyvmm": figure(values, unit)}
        targets[name] = verdict(median(values), most)

    note("killed", [lost(signal.SIGKILL) for _ in range(DEATHS)], "ms", 50.0)
    with etcd() as arbiter:
        note("killed_etcd", [lost(signal.SIGKILL, arbiter) for _ in range(DEATHS)], "ms", 50.0)
    note("silent", [lost(signal.SIGSTOP) for _ in range(DEATHS)], "ms", 350.0)
    memory = resident(4000)
    note("resident_4000", [memory["seen"]], "MiB", memory["allowed"])
    for pages in (100, 4000):
        figures[f"cpu_{pages}"] = {"pyvmm": figure([cpu_of_checkpoints(pages) for _ in range(2)], "ms")}
    modes = {"hybrid": (How(), 0.95), "periodic": (How(mode="periodic", delay=100), 0.85)}
    for name, (how, least) in modes.items():
        shares = [throughput(how) / throughput(How(alone=True)) for _ in range(3)]
        figures[f"throughput_{name}"] = {"pyvmm": figure(shares, "of unprotected", 3)}
        targets[f"throughput_{name}"] = {"value": median(shares), "target_at_least": least,
                                         "met": median(shares) >= least}  # fmt: skip


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
    lines += ["", "| pyvmm alone | seen | target |", "| --- | --- | --- |"]
    for name, text, target in (
        ("killed", "from SIGKILL of the primary to the guest running, arbiter (a file) asked", "50 ms"),
        ("killed_etcd", "the same, etcd asked", "50 ms"),
        ("silent", "from a primary that falls silent (SIGSTOP) to the same", "350 ms"),
        ("resident_4000", "secondary's memory, 128 MiB guest, 4,000 pages", "1.1 guest + written + checkpoint"),
        ("cpu_100", "CPU time of both for one checkpoint of 100 pages", "-"),
        ("cpu_4000", "of 4,000 pages", "-"),
        ("throughput_hybrid", "guest's rounds against unprotected, hybrid, 500 ms", "0.95"),
        ("throughput_periodic", "the same, periodic, 100 ms", "0.85"),
    ):
        value = figures[name]["pyvmm"]
        lines.append(f"| {text} | {value.median:.4g} {value.unit} | {target} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--table"]:
        print(table())
    else:
        main(measure)
