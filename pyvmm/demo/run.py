"""The story of the demo: protect, kill, go on, protect again; with clients that work all the time.

::

    network, certificates -> bob waits -> alice boots -> the service answers -> bob protects alice's guest
    -> clients work -> one dies -> the other goes on alone -> carol protects it -> clients work -> their histories

``alice`` begins as the primary on host "primary", ``bob`` as the secondary on host "secondary", ``carol`` takes the
place of whichever was lost; and so on, if there are more failures.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from pyvmm.demo.machines import ALONE_DEADLINE, LOOK, QUIT_DEADLINE, Vm, run_folder
from pyvmm.demo.outcome import DemoOptions, Failure, Kill, Outcome, VmKind
from pyvmm.demo.topology import Host, Topology
from pyvmm.demo.watch import Watch
from pyvmm.demo.workload import Workload, gaps
from pyvmm.errors import DeadlineError, HostError, PyvmmError

NAMES = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi")
READY_DEADLINE = 240.0
"""Linux boots in half a minute where its kernel is emulated, and other machines want the CPU, too."""
BEFORE, ALONE = 0.4, 0.2
"""Shares of the clients' time for a failure: before it; and with the survivor alone. The rest is the next pair's."""
WARM_UP_DEADLINE = 60.0
IMPATIENT = 0.5
"""Seconds for answers that nobody wants any more: the run has ended otherwise."""
AFTERMATH = 1.0
"""Seconds behind the failover in which a request still counts for the gap."""

Say = Callable[[str], None]


def run_demo(options: DemoOptions, say: Say) -> Outcome:
    """Run it; ``say`` gets a line for each step. HostError, DeadlineError, ConfigError: it could not be shown."""
    if os.geteuid() != 0:
        raise HostError("pyvmm colo demo makes network namespaces: run it as root")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(run_folder())
        topology = stack.enter_context(Topology())
        story = _Story(options, say, folder, topology, stack)
        try:
            return story.tell()
        finally:
            story.stop()
            if options.report is not None:
                options.report.mkdir(parents=True, exist_ok=True)
                for log in folder.glob("*.log"):
                    shutil.copy(log, options.report)


def workload_of(kind: VmKind, topology: Topology) -> Workload:
    """ConfigError: its guest has not been built."""
    if kind == "linux":
        from pyvmm.demo.store import StoreWorkload

        return StoreWorkload(topology)
    from pyvmm.demo.echo import EchoWorkload

    return EchoWorkload(topology)


class _Story:
    def __init__(
        self, options: DemoOptions, say: Say, folder: Path, topology: Topology, stack: contextlib.ExitStack
    ) -> None:
        self._options, self._folder, self._topology, self._stack = options, folder, topology, stack
        self._workload = workload_of(options.vm, topology)
        self._outcome = Outcome(options, self._workload.title, time.monotonic())
        self._say_line = say
        self._born: dict[str, float] = {}
        self._watch = Watch()

    def tell(self) -> Outcome:
        """All of it."""
        options, outcome, topology = self._options, self._outcome, self._topology
        self._say("network namespaces: client, primary, secondary, and a switch between them")
        self._make_credentials()
        secondary = self._start("bob", topology.secondary, secondary=True)
        primary = self._start("alice", topology.primary, secondary=False)
        self._say(f"alice boots {outcome.title}; bob waits for her guest")
        self._workload.wait_ready(READY_DEADLINE)
        self._say("alice's guest answers its clients")
        self._protect(primary, secondary)
        self._say(f"{options.clients} clients work", mark="clients begin")
        self._workload.start(options.clients)
        self._warm_up()
        for number in range(options.kills):
            time.sleep(options.seconds * BEFORE)
            failure, survivor, victim = self._fail(options.kill[number % len(options.kill)], primary, secondary)
            time.sleep(options.seconds * ALONE)
            victim.close()
            topology.mend_link()
            primary, secondary = survivor, self._start(_name(number + 2), victim.host, secondary=True)
            self._protect(primary, secondary)
            failure.protected = time.monotonic()
        time.sleep(options.seconds * (1 - BEFORE - ALONE))
        self._workload.stop()
        self._say("the clients have stopped; what they were told is checked", mark="clients end")
        self._workload.read_all()
        self._watch.stop()
        self._count()
        for vm in (primary, secondary):  # in this order: the guest is over, and the secondary hears of that
            vm.quit()
            self._ended(vm)
        return outcome

    def _warm_up(self) -> None:
        """Until each client has had an answer: a failure is to be seen by all of them."""
        until = time.monotonic() + WARM_UP_DEADLINE
        while len({one.client for one in self._workload.exchanges()}) < self._options.clients:
            if time.monotonic() > until:
                raise DeadlineError(f"not every client had an answer within {WARM_UP_DEADLINE:g} s")
            time.sleep(LOOK)

    def _count(self) -> None:
        outcome, watch = self._outcome, self._watch
        outcome.verdict = self._workload.verdict()
        outcome.exchanges = self._workload.exchanges()
        outcome.checkpoints, outcome.held = watch.checkpoints, watch.held
        for failure in outcome.failures:
            failure.gaps = gaps(outcome.exchanges, failure.at, failure.alone + AFTERMATH)
        for _, differences in sorted(watch.differences.items()):
            outcome.differences += differences

    def stop(self) -> None:
        """Whatever has happened: no thread is left."""
        self._workload.stop(IMPATIENT)
        self._watch.stop()

    def _say(self, text: str, mark: str = "") -> None:
        """``mark``: a kind of Mark to make with the same text, or the text of a plain one."""
        now = time.monotonic()
        self._say_line(f"{now - self._outcome.began:7.2f} s  {text}")
        if mark in ("death", "rescue", "protected"):
            self._outcome.mark(text, mark)  # type: ignore[arg-type]
        elif mark:
            self._outcome.mark(mark)

    def _make_credentials(self) -> None:
        from pyvmm.migration.tls import make_credentials

        make_credentials(self._folder / "tls", [host.address for host in self._topology.hosts])

    def _start(self, name: str, host: Host, *, secondary: bool) -> Vm:
        options = self._options
        words = (
            *self._workload.words, *(() if secondary else self._workload.first_words),
            "--net", host.net_option, "--arbiter", f"file:{self._folder}/arbiter",
            "--tls-creds", str(self._folder / "tls"), "--colo-mode", options.mode,
            "--heartbeat", str(options.heartbeat), "--heartbeat-loss", str(options.heartbeat_loss),
            *(("--colo", "secondary", "--incoming", host.replication_uri) if secondary else ("--colo", "primary")),
        )  # fmt: skip
        vm = Vm(name, host, words, self._folder)
        self._stack.callback(vm.close)
        self._born[name] = time.monotonic()
        if secondary:
            vm.wait_for(lambda: vm.ask("query-status", oob=True)["status"] == "inmigrate", "waiting", ALONE_DEADLINE)
        self._watch.add(vm)
        return vm

    def _ended(self, vm: Vm) -> None:
        self._outcome.machines.append((vm.name, vm.host.name, self._born[vm.name], time.monotonic()))

    def _protect(self, primary: Vm, secondary: Vm) -> None:
        began = time.monotonic()
        primary.protect(secondary, mode=self._options.mode, tls_creds=self._folder / "tls")
        took = time.monotonic() - began
        self._say(f"{secondary.name} protects {primary.name}'s guest: {took:.2f} s", "protected")

    def _fail(self, kind: Kill, primary: Vm, secondary: Vm) -> tuple[Failure, Vm, Vm]:
        """(what came of it, who goes on, who does not)."""
        before = {vm: vm.failovers() for vm in (primary, secondary)}
        if kind == "link":
            at = time.monotonic()
            self._topology.cut_link()
            self._say("the replication link is silent; nobody is told", "death")
            survivor, victim = self._winner(before)
        else:
            victim, survivor = (primary, secondary) if kind == "primary" else (secondary, primary)
            at = victim.kill()
            self._say(f"SIGKILL for {victim.name}, the {kind}", "death")
            survivor.wait_for(lambda: survivor.is_alone(before[survivor]), "taking over", ALONE_DEADLINE)
        alone = time.monotonic()
        self._say(f"{survivor.name} goes on alone, {(alone - at) * 1000:.0f} ms after it", "rescue")
        self._ended(victim)
        last = survivor.ask("query-colo-stats", oob=True).get("last-failover")
        failure = Failure(kind, at, victim.name, survivor.name, alone, last)
        self._outcome.failures.append(failure)
        return failure, survivor, victim

    def _winner(self, before: dict[Vm, int]) -> tuple[Vm, Vm]:
        """Whom the arbiter gave the guest to. The loser ends by itself, or two would answer the clients."""
        pair = tuple(before)
        until = time.monotonic() + ALONE_DEADLINE
        while time.monotonic() < until:
            for survivor, loser in (pair, pair[::-1]):
                won = False
                with contextlib.suppress(PyvmmError):  # a loser ends, perhaps while it is asked
                    won = survivor.is_alone(before[survivor])
                if won:
                    loser.wait_end(QUIT_DEADLINE)
                    self._say(f"{loser.name} has lost at the arbiter, and ended with status {loser.process.returncode}")
                    return survivor, loser
            time.sleep(LOOK)
        raise HostError("neither side has taken the guest")


def _name(number: int) -> str:
    return NAMES[number] if number < len(NAMES) else f"machine{number}"
