"""A Linux guest's service, as its clients find it: unprotected, protected in hybrid mode, and each 100 ms periodically.

The store of guests/linux in a guest, its clients in a namespace of their own, both hosts on this machine: as in ``pyvmm
colo demo``. The clients keep a connection each and ask again as soon as they are answered, so many that the guest is
busy all the time, which is half of a machine with two CPUs; its replica is the other half. Rounds take turns.

- ``agree``: all read one register. The answers of both guests are the same bytes, whatever came first.
- ``mixed``: the demo's requests; entries are numbered, so two guests that are asked in another order answer otherwise.

``latency`` is that of all requests of a round. ``cpu`` is what the processes of both hosts took for a request.

``--record FILE`` has tcpdump keep what crosses the primary's tap, for colo_compare.py. ``--gap N`` is the demo with N
SIGKILLs of the primary, or with ``--link`` N silent links: what its clients waited beyond their usual latency, alone.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from figures import document, figure, main, paired_ratio

from pyvmm.demo.machines import ALONE_DEADLINE, Vm, run_folder
from pyvmm.demo.outcome import DemoOptions, Kill
from pyvmm.demo.run import run_demo
from pyvmm.demo.store import StoreLink, StoreWorkload
from pyvmm.demo.topology import TAP, Host, Topology
from pyvmm.errors import ChannelError, DeadlineError, HostError
from pyvmm.migration.tls import make_credentials

CLIENTS, ROUNDS, SECONDS = 4, 3, 8.0
SETTLE = 1.0
"""Seconds of work before any of it counts."""
BOOT_DEADLINE = 240.0
ANSWER_DEADLINE = 20.0
STATES = ("unprotected", "hybrid", "periodic")
PATIENT = ("--heartbeat", "250", "--heartbeat-loss", "12")
"""Nothing is to fail here: a machine busy with two guests and their clients is no reason to."""
TARGET = 0.8
GAP_MS: dict[Kill, float] = {"primary": 500, "link": 1200}
"""A link's: a second, and one retransmission of TCP (RFC 6298, with the 200 ms that are Linux's least)."""
GAP_SECONDS = 4.0
"""Of the clients' work for each failure."""
PACKETS_MAX = 4000
RECORDER_DEADLINE = 10.0


class Measured(NamedTuple):
    """One state in one round. Milliseconds; CPU seconds and checkpoints for each thousand requests."""

    throughput: float
    latency: float
    slow: float
    """The 99th percentile."""
    cpu: float
    checkpoints: float


class Client:
    """Asks again and again, on a thread, for as long as :meth:`stop` has not been called."""

    def __init__(self, number: int, topology: Topology, mix: str) -> None:
        self.answered: list[tuple[float, float]] = []
        """(when, seconds it took)."""
        self.problem: str | None = None
        self._number, self._topology, self._mix = number, topology, mix
        self._random = random.Random(number)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"client {number}")
        self._thread.start()

    def _run(self) -> None:
        try:
            with contextlib.closing(StoreLink(self._topology, time.monotonic() + ANSWER_DEADLINE)) as link:
                while not self._stop.is_set():
                    asked = time.monotonic()
                    link.send(*self._request())
                    link.receive(asked + ANSWER_DEADLINE)
                    self.answered.append((time.monotonic(), time.monotonic() - asked))
        except (ChannelError, DeadlineError) as error:
            self.problem = f"client {self._number}: {error}"

    def _request(self) -> tuple[str, str, bytes]:
        if self._mix == "agree" or (chance := self._random.random()) < 0.3:
            return "GET", "/register", b""
        if chance < 0.6:
            return "POST", "/append", b"%d.%d" % (self._number, len(self.answered))
        return ("PUT", "/register", b"%d" % self._number) if chance < 0.7 else ("GET", "/length", b"")

    def stop(self) -> None:
        self._stop.set()

    def join(self) -> None:
        self._thread.join(2 * ANSWER_DEADLINE)


class Service:
    """A guest on one host, and a second host that may protect it."""

    def __init__(self, folder: Path, topology: Topology, stack: contextlib.ExitStack) -> None:
        self._folder, self._topology, self._stack = folder, topology, stack
        self._workload = StoreWorkload(topology)
        make_credentials(folder / "tls", [host.address for host in topology.hosts])
        self._started = 0
        self._primary = self._start(topology.primary, "--colo", "primary", words=self._workload.first_words)
        self._secondary: Vm | None = None
        self._workload.wait_ready(BOOT_DEADLINE)

    def _start(self, host: Host, *colo: str, words: tuple[str, ...] = ()) -> Vm:
        self._started += 1
        vm = Vm(
            f"{host.name}{self._started}", host,
            (*self._workload.words, *words, "--net", host.net_option, "--arbiter", f"file:{self._folder}/arbiter",
             "--tls-creds", str(self._folder / "tls"), *PATIENT, *colo), self._folder,
        )  # fmt: skip
        self._stack.callback(vm.close)
        return vm

    def become(self, state: str) -> None:
        """Have it in one of STATES."""
        primary = self._primary
        if self._secondary is not None:
            before = primary.failovers()
            self._secondary.kill()
            self._secondary = None
            primary.wait_for(lambda: primary.is_alone(before), "being alone", ALONE_DEADLINE)
        if state == "unprotected":
            return
        host = self._topology.secondary
        secondary = self._start(host, "--colo", "secondary", "--incoming", host.replication_uri)
        secondary.wait_for(
            lambda: bool(secondary.ask("query-status", oob=True)["status"] == "inmigrate"), "waiting", ALONE_DEADLINE
        )
        primary.protect(secondary, mode=state, tls_creds=self._folder / "tls")
        self._secondary = secondary

    def measure(self, mix: str, seconds: float) -> Measured:
        """Let clients work."""
        clients = [Client(number, self._topology, mix) for number in range(CLIENTS)]
        try:
            time.sleep(SETTLE)
            began, busy, made = time.monotonic(), self._busy(), self._checkpoints()
            time.sleep(seconds)
            ended, busy, made = time.monotonic(), self._busy() - busy, self._checkpoints() - made
        finally:
            for client in clients:
                client.stop()
            for client in clients:
                client.join()
        for client in clients:
            if client.problem is not None:
                raise HostError(f"not measured: {client.problem}")
        took = [1000 * each for client in clients for at, each in client.answered if began <= at <= ended]
        if len(took) < 2:
            raise HostError(f"not measured: {len(took)} requests were answered")
        slow = statistics.quantiles(took, n=100)[98]
        count = len(took)
        return Measured(
            count / (ended - began), statistics.median(took), slow, 1000 * busy / count, 1000 * made / count
        )

    def _busy(self) -> float:
        vms = [self._primary] + ([self._secondary] if self._secondary is not None else [])
        times = [psutil.Process(vm.process.pid).cpu_times() for vm in vms]
        return sum(each.user + each.system for each in times)

    def _checkpoints(self) -> int:
        return int(self._primary.ask("query-colo-stats", oob=True)["checkpoints"])


@contextlib.contextmanager
def service(record: Path | None) -> Iterator[Service]:
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(run_folder())
        topology = stack.enter_context(Topology())
        guest = Service(folder, topology, stack)
        if record is not None:
            stack.enter_context(recording(topology.primary, record))
        yield guest


@contextlib.contextmanager
def recording(host: Host, file: Path) -> Iterator[None]:
    """tcpdump at the guest's tap. HostError: there is none."""
    command = ["tcpdump", "-i", TAP, "-w", str(file), "-U", "-s", "0", "-c", str(PACKETS_MAX), "-Z", "root"]
    process = subprocess.Popen(
        host.space.command("setpriv", "--pdeathsig", "KILL", "--", *command), stderr=subprocess.PIPE, text=True
    )
    try:
        yield
    finally:
        process.terminate()
        words = process.communicate(timeout=RECORDER_DEADLINE)[1]
    if process.returncode:
        raise HostError(f"tcpdump recorded nothing: {words.strip()}; run make packages")


def gap(failures: int, kind: Kill) -> dict[str, Any]:
    """The demo with that many of them."""
    asked = DemoOptions(vm="linux", kill=(kind,), kills=failures, clients=CLIENTS, seconds=GAP_SECONDS)
    outcome = run_demo(asked, lambda line: print(line, file=sys.stderr, flush=True))
    waited = figure([1000 * each for failure in outcome.failures for each in failure.gaps], "ms", 0)
    assert outcome.verdict is not None
    lost = {"connections": outcome.verdict.connections_lost, "acknowledged_writes": outcome.verdict.writes_lost}
    return document(
        what=f"{outcome.title}: {failures} failures ({kind}) under {CLIENTS} clients, hybrid, heartbeat "
        f"{asked.heartbeat} ms, {asked.heartbeat_loss} lost",
        against="each client's own median latency before the failure, which is taken off",
        gap=waited,
        failover=figure([one.failover for one in outcome.failures if one.failover is not None], "ms"),
        lost=lost,
        history=outcome.verdict.text,
        target={
            "gap_median": {
                "value": waited.median, "target_at_most": GAP_MS[kind], "met": waited.median <= GAP_MS[kind],
            },
            "nothing_lost": {"met": outcome.ok},
        },
    )  # fmt: skip


def measure(rounds: int, seconds: float, record: Path | None) -> dict[str, Any]:
    """All states, in turns, with both mixes."""
    found: dict[tuple[str, str], list[Measured]] = {}
    with service(record) as guest:
        for number in range(rounds):
            for state in STATES:
                guest.become(state)
                for mix in ("agree", "mixed"):
                    found.setdefault((mix, state), []).append(guest.measure(mix, seconds))
                    print(f"round {number + 1}: {mix}, {state}: {found[mix, state][-1]}", file=sys.stderr, flush=True)
    units = {"throughput": "1/s", "latency": "ms", "slow": "ms", "cpu": "s per 1000", "checkpoints": "per 1000"}
    figures = {
        f"{name}_{mix}_{state}": figure([float(getattr(one, name)) for one in all_of], unit)
        for (mix, state), all_of in found.items()
        for name, unit in units.items()
    }
    ratio = {
        f"{mix}_{state}": paired_ratio(
            [one.throughput for one in found[mix, state]], [one.throughput for one in found[mix, "unprotected"]]
        ).median
        for mix in ("agree", "mixed")
        for state in STATES[1:]
    }
    reached = ratio["agree_hybrid"]
    return document(
        what=f"a store in Linux behind HTTP, {CLIENTS} clients that ask without a pause, {seconds:g} s a round",
        against="the same guest, unprotected, in the same run",
        figures=figures,
        ratio=ratio,
        target={"agree_hybrid": {"value": reached, "target_at_least": TARGET, "met": reached >= TARGET}},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each state and mix of a round")
    parser.add_argument("--record", type=Path, metavar="FILE", help="pcap of what crosses the primary's tap")
    parser.add_argument("--gap", type=int, metavar="N", help="what clients see of N failures, and nothing else")
    parser.add_argument("--link", action="store_true", help="with --gap: silence the replication link, kill nobody")
    told = parser.parse_args()
    if told.gap is not None:
        main(lambda: gap(told.gap, "link" if told.link else "primary"))
    else:
        main(lambda: measure(told.rounds, told.seconds, told.record))
