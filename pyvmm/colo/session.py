"""One VM's protection, as long as its process lives: role, term, epoch, who asked for what, what was counted.

Everything here may be called from any thread. What waits, and acts, is the thread that owns the replication: the
primary's migration thread (primary.py), the secondary's incoming one (secondary.py); it is woken by :attr:`wake`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from pyvmm.colo.arbiter import ArbiterAway, Ownership, arbiter_from
from pyvmm.colo.config import ColoConfig
from pyvmm.colo.failover import Failover, FailoverStatus
from pyvmm.colo.heartbeat import Heartbeat
from pyvmm.colo.messages import Conversation
from pyvmm.colo.recording import FileRecorder
from pyvmm.errors import ChannelError, StateError
from pyvmm.trace import trace_group

T = trace_group("colo")

Role = Literal["none", "primary", "secondary"]
Mode = Literal["hybrid", "periodic"]
ExitReason = Literal["none", "request", "error", "processing"]
CLAIM_TRY = 1.0
"""Seconds for one claim; then it is looked whether this process ends, and asked again."""
ARBITER_DEADLINE = 5.0
"""Seconds to begin a pair."""
NAME_ROOM = 48
TIMES_KEPT = 1024
DIFFERENCES_KEPT = 100


class ColoLost(ChannelError):
    """The other side owns the guest: this one must not run it any more."""


@dataclass
class CheckpointTimes:
    """One checkpoint, as a primary saw it. Seconds and bytes."""

    epoch: int
    reason: str
    at: float
    pause: float = 0.0
    copy: float = 0.0
    """Of the pause: harvest and copy of the pages."""
    save: float = 0.0
    """Of the pause: the state of all but RAM."""
    received: float = 0.0
    """From the request to vmstate-received."""
    loaded: float = 0.0
    pages: int = 0
    zero_pages: int = 0
    delta_pages: int = 0
    """Sent as changes."""
    saved: int = 0
    """Bytes that this made ``size`` smaller."""
    size: int = 0


@dataclass
class ColoCounters:
    """What query-colo-stats tells."""

    checkpoints: int = 0
    bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    times: list[CheckpointTimes] = field(default_factory=list)
    """The last ones, TIMES_KEPT at most."""
    failovers: int = 0
    last_failover: float | None = None
    """Seconds from hearing of it to the guest running on."""
    disk_copied: int = 0
    """Bytes of disks that a secondary was sent before its first checkpoint; beside them what the guest wrote."""
    disk_same: int = 0
    """Bytes that it had already."""
    rolled_back_pages: int = 0
    """Secondary: pages it had written itself."""

    def note(self, times: CheckpointTimes) -> None:
        """A checkpoint that was received."""
        self.checkpoints += 1
        self.bytes += times.size
        self.reasons[times.reason] += 1
        self.times.append(times)
        del self.times[:-TIMES_KEPT]


class ColoSession:
    """Made once for a machine that has ``--colo``. Owns the event descriptor and, while there is one, the heartbeat."""

    def __init__(self, config: ColoConfig, name: str) -> None:
        self.config = config
        self.owner = f"{_plain(name)}-{secrets.token_hex(4)}"
        """This process, as the arbiter knows it."""
        self.pair = config.pair
        self.role: Role = "none"
        self.mode: Mode = "hybrid"
        self.term = 0
        self.epoch = 0
        """Checkpoints that both sides have; what the guest does now belongs to epoch ``epoch``."""
        self.last_mode: Role = "none"
        self.last_reason: ExitReason = "none"
        self.problem: str | None = None
        """Why protection ended."""
        self.peer_uri: str | None = None
        self.failover = Failover()
        self.counters = ColoCounters()
        self.heartbeat: Heartbeat | None = None
        self.on_exit: Callable[[Role, ExitReason], None] = lambda role, reason: None
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.differences: deque[tuple[float, str]] = deque(maxlen=DIFFERENCES_KEPT)
        """(time, what) of the last answers that were not alike."""
        self.runs = True
        """Whether the guest ran at the last checkpoint; else it was stopped by hand."""
        self.closing = False
        self.guest_ended = False
        self._asked: str | None = None
        self._wanted: tuple[ExitReason, str | None] = ("none", None)
        self._loading = False
        self._suspected_at: float | None = None
        self._conversation: Conversation | None = None
        self._arbiter = arbiter_from(config.arbiter)
        self.recorder = FileRecorder.open(config.record)
        self._lock = threading.Lock()

    # -- a pair's life, on the thread that owns the replication -----------------------------------

    def begin(self, role: Role, mode: Mode) -> None:
        """A pair is being made. StateError: there is one."""
        if self.role != "none":
            raise StateError(f"this VM is protected already, as the {self.role}")
        if self.failover.failover_get_state() is FailoverStatus.COMPLETED:
            self.failover.protect_again()
        self.role, self.mode, self.epoch, self.problem = role, mode, 0, None
        self._asked, self._suspected_at, self.guest_ended, self.runs = None, None, False, True

    def register_pair(self) -> None:
        """Primary: say at the arbiter that the two protect each other. StateError, ArbiterAway."""
        self.pair = self.pair or f"pair-{secrets.token_hex(6)}"
        self.term = self._ownership().begin_pair(ARBITER_DEADLINE)

    def talk(self, conversation: Conversation) -> None:
        """What :meth:`suspect` and :meth:`close` abort."""
        with self._lock:
            self._conversation = conversation

    def end(self, reason: ExitReason, problem: str | None) -> None:
        """There is no pair any more."""
        role, self.role = self.role, "none"
        self.last_mode, self.last_reason, self.problem = role, reason, problem
        heartbeat, self.heartbeat = self.heartbeat, None
        if heartbeat is not None:
            heartbeat.stop()
        with self._lock:
            conversation, self._conversation = self._conversation, None
        if conversation is not None:
            conversation.close()
        T.colo_exit.on and T.colo_exit(role, reason, problem or "")
        self.on_exit(role, reason)

    def claim(self) -> bool:
        """May this side act alone? Waits for the arbiter as long as it takes. ChannelError if this process ends."""
        while True:
            if self.closing:
                raise ChannelError("this machine is ending")
            try:
                won = self._ownership().claim(self.term, CLAIM_TRY)
            except ArbiterAway as error:
                T.colo_arbiter_away.on and T.colo_arbiter_away(str(error))
                continue
            self.term += won
            return won

    def wait_for_word(self) -> None:
        """Failover is by hand: wait until somebody says that the other side is gone. ChannelError if this side ends."""
        while not self.failover_wanted:
            if self.closing:
                raise ChannelError("this machine is ending")
            if select.select([self.wake], [], [], 1.0)[0]:
                os.eventfd_read(self.wake)

    def _ownership(self) -> Ownership:
        return Ownership(self._arbiter, self.pair, self.owner)

    # -- requests, from any thread ----------------------------------------------------------------

    def ask_checkpoint(self, reason: str) -> None:
        """Have one made now. StateError: this is no primary. Several at once are one."""
        if self.role != "primary":
            raise StateError("only the primary of a protected VM makes checkpoints")
        self._asked = self._asked or reason
        self.ring()

    def note_difference(self, what: str) -> None:
        """Why a checkpoint is asked for, in words."""
        self.differences.append((time.time(), what))

    def take_asked(self) -> str | None:
        """Why a checkpoint was asked for, once."""
        reason, self._asked = self._asked, None
        return reason

    def lost_heartbeat(self) -> None:
        """x-colo-lost-heartbeat: somebody says that the other side is gone. StateError: not protected, or under way."""
        if self.role == "none":
            raise StateError("this VM is not protected: there is no other side")
        self._request("request", None)

    def _request(self, reason: ExitReason, problem: str | None) -> None:
        with self._lock:
            self.failover.request()
            self._wanted = reason, problem
            if self._loading and self.failover.begin():
                self.failover.defer()  # the guest is half one checkpoint and half the next: first it is whole
        self._suspected_at = self._suspected_at or time.monotonic()
        if reason == "request":
            # Who was told is to ask the arbiter first; a side that saw the line end would ask, too, and might win.
            self._with_conversation(Conversation.fall_silent)
        else:
            self._with_conversation(Conversation.abort)

    def suspect(self, reason: str) -> None:
        """The heartbeat's: the other side is not heard any more."""
        if self.config.automatic and not self.guest_ended:
            with contextlib.suppress(StateError):  # it is being seen to
                self._request("error", reason)

    def note_suspicion(self) -> None:
        """From when on a failover is measured."""
        self._suspected_at = self._suspected_at or time.monotonic()

    def note_failover(self) -> None:
        """The guest runs on."""
        self.counters.failovers += 1
        if self._suspected_at is not None:
            self.counters.last_failover = time.monotonic() - self._suspected_at

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """While a checkpoint is put into place a failover is put off."""
        with self._lock:
            self._loading = True
        try:
            yield
        finally:
            with self._lock:
                self._loading = False
                if self.failover.failover_get_state() is FailoverStatus.RELAUNCH:
                    self.failover.relaunch()

    def begin_failover(self) -> None:
        """The thread that carries it out does so now, whoever asked for it."""
        with contextlib.suppress(StateError):
            self.failover.request()
        if not self.failover.begin():
            raise AssertionError(f"a failover is {self.failover.failover_get_state()} where it is to begin")

    @property
    def why_wanted(self) -> tuple[ExitReason, str | None]:
        """Why a failover was asked for: by somebody, or because nothing is heard of the other side."""
        return self._wanted

    @property
    def failover_wanted(self) -> bool:
        """Whether somebody asked for it."""
        return self.failover.failover_get_state() is FailoverStatus.REQUIRE

    def ended(self) -> None:
        """The guest is over, by its own doing."""
        self.guest_ended = True
        self.ring()

    def ring(self) -> None:
        """Wake who waits."""
        with self._lock:
            if self.wake >= 0:
                os.eventfd_write(self.wake, 1)

    def give_up(self) -> None:
        """This side cannot go on as what it is: whoever waits, fails."""
        self._with_conversation(Conversation.abort)

    def close(self) -> None:
        """This process ends: whoever waits, fails."""
        self.closing = True
        self._with_conversation(Conversation.abort)

    def release(self) -> None:
        """Give the descriptor back; nobody waits any more."""
        with self._lock:
            wake, self.wake = self.wake, -1
        if wake >= 0:
            os.close(wake)
        if self.recorder is not None:
            self.recorder.close()

    def _with_conversation(self, end: Callable[[Conversation], None]) -> None:
        """Whoever waits is to look up."""
        with self._lock:
            conversation = self._conversation
        if conversation is not None:
            end(conversation)
        self.ring()


def _plain(name: str) -> str:
    text = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name)[:NAME_ROOM]
    return text if text[:1].isalnum() else f"vm{text}"[:NAME_ROOM]
