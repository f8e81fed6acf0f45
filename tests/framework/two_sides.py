"""Both sides of a pair in one process: all of COLO's code but KVM's and the guest's, who is a number that counts.

Every step of the conversation is a point at which something can be made to happen (:class:`World`). Sockets, threads,
heartbeats, the session and the arbiter are the real ones.
"""

from __future__ import annotations

import contextlib
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

from pyvmm.colo import primary as primary_module
from pyvmm.colo import secondary as secondary_module
from pyvmm.colo.arbiter import ArbiterAway, Ownership, Register
from pyvmm.colo.cards import PrimaryCards, SecondaryCards
from pyvmm.colo.config import ColoConfig
from pyvmm.colo.disks import PrimaryDisks, SecondaryDisks
from pyvmm.colo.messages import Conversation
from pyvmm.colo.primary import Primary
from pyvmm.colo.replicated_machine import Copied
from pyvmm.colo.secondary import Secondary
from pyvmm.colo.session import ColoSession
from pyvmm.errors import ChannelError, PyvmmError
from pyvmm.machine.output_hold import OutputHold
from pyvmm.migration.channel import Listener, connect
from pyvmm.migration.parameters import Parameters
from pyvmm.migration.protocol import Message, expect
from pyvmm.net.compare import CompareTunables

TICK = 0.0005
STATE = struct.Struct("<Q")
END_DEADLINE = 20.0
BEAT, LOSS = 0.02, 5


class Guest:
    """A machine as COLO sees it (ReplicatedMachine), whose guest counts and says each number."""

    def __init__(self, name: str, hear: Callable[[str, int], None]) -> None:
        self.name, self.count, self.runs, self.dead, self.lost = name, 0, False, False, False
        self._hear = hear
        self._paused_here = False
        self.lock = threading.RLock()
        hold = OutputHold(self._out)
        memory = SimpleNamespace(regions=(), size=65536)
        loop = SimpleNamespace(call_later=lambda seconds, call: SimpleNamespace(cancel=lambda: None))
        self.machine: Any = SimpleNamespace(
            backend=SimpleNamespace(hold=hold), memory=memory, dirty=None, devices=(), loop=loop, run_state=None
        )
        self.hold = hold
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._live, name=f"guest of {name}")
        self._thread.start()

    def _live(self) -> None:
        while not self._ending.wait(TICK):
            with self.lock:
                if self.runs and not self.dead:
                    self.count += 1
                    self.hold.put(b"%d " % self.count)

    def end_thread(self) -> None:
        self._ending.set()
        self._thread.join(5)

    def _out(self, data: bytes) -> None:
        if not self.dead:
            for number in data.split():
                self._hear(self.name, int(number))

    # -- ReplicatedMachine ----------------------------------------------------------------------

    def pause(self) -> None:
        with self.lock:
            self._paused_here |= self.runs
            self.runs = False

    suspend = pause

    def copy(self, staging: Any, cards: Any, disks: Any, epoch: int) -> Copied:
        with self.lock:
            self.pause()
            self.hold.mark()
            return Copied(STATE.pack(self.count), self._paused_here, 0.0, 0.0)

    def go_on(self) -> None:
        with self.lock:
            self.runs, self._paused_here = self.runs or self._paused_here, False

    def output(self, mode: Any) -> None:
        self.hold.set(mode)

    def become_shadow(self) -> None:
        self.output("discard")

    def prepare(self, state: memoryview, cards: Any, disks: Any, epoch: int) -> Callable[[], None]:
        (count,) = STATE.unpack(state)

        def apply() -> None:
            self.count = count

        return apply

    def load(self, apply: Callable[[], None]) -> None:
        with self.lock:
            assert not self.runs
            apply()

    def run_replica(self) -> None:
        with self.lock:
            self.runs, self._paused_here = True, False

    def emerge(self, *, running: bool) -> None:
        with self.lock:
            self.output("pass")
            self.runs = running

    def lose(self, reason: str) -> None:
        with self.lock:
            self.output("discard")
            self.runs, self.lost = False, True

    def end(self, ending: Any) -> None:
        self.lose("")


class FakeReplica:
    """There is no memory but the number."""

    def __init__(self, memory: Any, dirty: Any) -> None: ...

    def protect(self) -> None: ...

    def check(self, batches: Sequence[Any]) -> None:
        assert not batches

    def roll_forward(self, batches: Sequence[Any]) -> Any:
        return SimpleNamespace(dropped=0, written=0)

    def release(self) -> None: ...


class Side:
    """One process, as it were. ``outcome``: "owner", "never paired", or why not; ``None``: it is still at it."""

    def __init__(self, name: str, folder: str, hear: Callable[[str, int], None], parameters: Parameters) -> None:
        self.guest = Guest(name, hear)
        role: Any = name
        self.session = ColoSession(
            ColoConfig(role=role, arbiter=f"file:{folder}/arbiter", pair="pair", heartbeat=BEAT, loss=LOSS,
                       staging=1 << 20), name,
        )  # fmt: skip
        self.parameters = parameters
        self.outcome: str | None = None
        self.paired = False
        self.thread: threading.Thread | None = None

    def start(self, run: Callable[[], None]) -> None:
        def main() -> None:
            try:
                run()
                self.outcome = "killed" if self.guest.dead else "owner"
            except PyvmmError as error:
                never = self.guest.name == "primary" and not self.paired  # then nothing has changed
                self.outcome = f"not: {error}" if not never or self.guest.dead else "never paired"
            except BaseException as error:  # a defect
                self.outcome = f"internal: {type(error).__name__}: {error}"

        self.thread = threading.Thread(target=main, name=self.guest.name)
        self.thread.start()

    def entered(self) -> None:
        self.paired = True

    def kill(self) -> None:
        """SIGKILL: it says, and claims, nothing any more, and its connections break."""
        self.guest.dead = True
        self.session.closing = True

        def claim() -> bool:
            raise ChannelError("it is dead")

        self.session.claim = claim  # type: ignore[method-assign]
        self.cut()

    def cut(self) -> None:
        """Its connections break."""
        heartbeat = self.session.heartbeat
        if heartbeat is not None:
            with contextlib.suppress(OSError):
                heartbeat._socket.shutdown(2)
        self.session.give_up()


class World:
    """The two, what clients heard in its order, and what happens at which step."""

    def __init__(self, mode: str, events: dict[int, str]) -> None:
        self.heard: list[tuple[str, int]] = []
        self.steps = 0
        self.last_step = max(events, default=0) + 12
        self.away_until = 0.0
        self._events = dict(events)
        self._lock = threading.Lock()
        self.parameters = Parameters(
            x_colo_mode=mode, x_checkpoint_delay=2, x_checkpoint_timeout=1000  # type: ignore[arg-type]
        )

    def hear(self, name: str, number: int) -> None:
        self.heard.append((name, number))

    def step(self) -> None:
        """One message is about to be sent, or was. Whoever comes here first carries an event out."""
        with self._lock:
            self.steps += 1
            event = self._events.pop(self.steps, None)
            if event is None and self.steps == self.last_step:
                event = "ask secondary"
        if event is not None:
            self.carry_out(event)

    def carry_out(self, event: str) -> None:
        what, _, who = event.partition(" ")
        side = {"primary": self.primary, "secondary": self.secondary}.get(who)
        if what == "kill" and side is not None:
            side.kill()
        elif what == "cut":
            self.primary.cut()
            self.secondary.cut()
        elif what == "stall":
            time.sleep(0.2)  # whoever has come here
        elif what == "ask" and side is not None:
            with contextlib.suppress(PyvmmError):
                side.session.lost_heartbeat()
        elif what == "away":
            self.away_until = time.monotonic() + 0.15

    def _claim(self, real: Callable[[Ownership, int, float], bool]) -> Callable[[Ownership, int, float], bool]:
        def claim(ownership: Ownership, term: int, seconds: float) -> bool:
            if time.monotonic() < self.away_until:
                time.sleep(0.02)
                raise ArbiterAway("away")
            return real(ownership, term, seconds)

        return claim

    def _stepping(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(*arguments: Any, **options: Any) -> Any:
            self.step()
            result = real(*arguments, **options)
            self.step()
            return result

        return stepped

    @contextlib.contextmanager
    def _rigged(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in ("send", "send_with"):
                stack.enter_context(mock.patch.object(Conversation, name, self._stepping(getattr(Conversation, name))))
            stack.enter_context(mock.patch.object(Ownership, "claim", self._claim(Ownership.claim)))
            stack.enter_context(mock.patch.object(secondary_module, "ReplicaMemory", FakeReplica))
            fine = SimpleNamespace(private_memfd_works=True)
            stack.enter_context(mock.patch.object(secondary_module, "load_profile", lambda: fine))
            stack.enter_context(mock.patch.object(primary_module, "without_collections", contextlib.nullcontext))
            stack.enter_context(mock.patch.object(secondary_module, "without_collections", contextlib.nullcontext))
            yield

    def run(self) -> Register | None:
        """To the end; what the arbiter holds then. AssertionError: somebody waits without end."""
        with tempfile.TemporaryDirectory(prefix="pyvmm-") as folder, self._rigged():
            self.primary = Side("primary", folder, self.hear, self.parameters)
            self.secondary = Side("secondary", folder, self.hear, self.parameters)
            try:
                self._start(f"unix:{folder}/s")
                deadline = time.monotonic() + END_DEADLINE
                for side in (self.primary, self.secondary):
                    assert side.thread is not None
                    side.thread.join(max(0.0, deadline - time.monotonic()))
                    assert not side.thread.is_alive(), f"the {side.guest.name} waits for ever"
                time.sleep(10 * TICK)  # who is alone says something
                return self.primary.session._arbiter.read("pair", 1.0)
            finally:
                for side in (self.primary, self.secondary):
                    side.session.close()
                    side.guest.end_thread()
                for side in (self.primary, self.secondary):
                    if side.thread is not None:
                        side.thread.join(5)
                    side.session.release()

    def _start(self, uri: str) -> None:
        one, two = self.primary, self.secondary
        listener = Listener(uri, several=True)

        def post(call: Callable[[], None]) -> None:
            call()

        def wait() -> None:
            channel = listener.accept(timeout=5, stall=5)
            try:
                payload = expect(channel, Message.COLO)[1]
                guest: Any = two.guest
                Secondary(
                    two.session, guest, lambda: two.parameters, post, listener,
                    SecondaryCards(two.guest.machine, two.session), SecondaryDisks(two.guest.machine, two.session),
                ).run(channel, payload, two.entered)  # fmt: skip
            finally:
                channel.close()
                listener.close()

        def protect() -> None:
            channel = connect(uri, timeout=5, stall=5)
            try:
                guest: Any = one.guest
                Primary(
                    one.session, guest, lambda: one.parameters, post,
                    PrimaryCards(one.guest.machine, one.session, CompareTunables()),
                    PrimaryDisks(one.guest.machine, one.session),
                ).run(channel, uri, one.entered)  # fmt: skip
            finally:
                channel.close()

        one.guest.runs = True
        two.start(wait)
        one.start(protect)
