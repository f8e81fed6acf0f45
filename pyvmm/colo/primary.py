"""The primary: checkpoint after checkpoint on the migration's thread, until one of the two is alone.

The guest stands still only while its state is saved and the pages it wrote are copied (staging.py); they are sent while
it runs on. Its output up to a checkpoint is let out when the secondary has all of that (periodic), or because both
answered alike (hybrid).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import time
from collections.abc import Callable
from typing import TypeVar

from pyvmm.colo.cards import PrimaryCards
from pyvmm.colo.checkpoint import Summed, head_of, pages_size, state_size
from pyvmm.colo.config import check_plaintext
from pyvmm.colo.disks import PrimaryDisks
from pyvmm.colo.heartbeat import Heartbeat
from pyvmm.colo.links import TOKEN, VERSION, Answer, LinkKind, Offer, hello_of, open_link
from pyvmm.colo.messages import Conversation, Message
from pyvmm.colo.replicated_machine import Copied, ReplicatedMachine
from pyvmm.colo.session import CheckpointTimes, ColoSession, ExitReason
from pyvmm.colo.staging import Staging
from pyvmm.errors import ChannelError, HostError, PyvmmError, StateError
from pyvmm.migration.channel import Channel
from pyvmm.migration.loop_call import begin_on_loop, call_on_loop
from pyvmm.migration.parameters import Parameters
from pyvmm.migration.protocol import Message as MigrationMessage
from pyvmm.migration.protocol import decode, expect, send_struct
from pyvmm.migration.standstill import without_collections
from pyvmm.trace import trace_group

T = trace_group("colo")

R = TypeVar("R")
FREE_EVERY = 10.0
"""Seconds. The guest finds each page that this is about anew, once."""
TURNS = 100
"""Of the loop, until what a guest asked for has been seen to."""


class Primary:
    """``parameters`` is asked anew for each checkpoint; ``post`` runs a callback on the machine's loop soon."""

    def __init__(
        self,
        session: ColoSession,
        side: ReplicatedMachine,
        parameters: Callable[[], Parameters],
        post: Callable[[Callable[[], None]], None],
        cards: PrimaryCards,
        disks: PrimaryDisks,
    ) -> None:
        self._session = session
        self._side = side
        self._cards = cards
        self._disks = disks
        self._parameters = parameters
        self._post = post
        self._conversation: Conversation
        self._staging: Staging
        self._free_next = 0.0

    def run(self, channel: Channel, uri: str, entered: Callable[[], None]) -> None:
        """Make a pair with who listens at ``uri`` and is at the other end of ``channel``, which has the memory but for
        what was written since; ``entered()`` when it has agreed. Returns when there is no pair any more and the guest
        is this side's. PyvmmError: it never came to a pair; the guest goes on as before.
        """
        session, parameters = self._session, self._parameters()
        mode = parameters.x_colo_mode
        session.begin("primary", mode)
        try:
            check_plaintext(uri, parameters.tls_creds, session.config)
            self._pair_up(channel, uri, parameters)
        except BaseException as error:
            self._close_streams()
            session.end("error", str(error))
            raise
        self._staging = Staging(session.config.staging, self._side.machine.memory.regions)
        entered()
        reason: ExitReason = "none"
        problem: str | None = None
        try:
            if mode == "periodic":
                self._on_loop(lambda: self._side.output("hold"))
            self._copy_disks()
            reason, problem = self._serve()
        except ChannelError as error:
            reason, problem = session.why_wanted if session.failover_wanted else ("error", str(error))
        except PyvmmError as error:
            reason, problem = "processing", str(error)
        except Exception as error:  # a defect, but the guest is not to pay for it
            reason, problem = "processing", f"internal error: {type(error).__name__}: {error}"
        finally:
            self._staging.close()
        session.note_suspicion()
        try:
            self._alone(reason, problem)
        finally:
            self._close_streams()

    def _close_streams(self) -> None:
        self._cards.close()
        self._disks.close()

    def _pair_up(self, channel: Channel, uri: str, parameters: Parameters) -> None:
        session, config = self._session, self._session.config
        session.register_pair()
        timeout = parameters.x_checkpoint_timeout / 1000
        offer = Offer(
            VERSION, "primary", session.pair, session.term, session.mode, timeout, secrets.token_bytes(TOKEN),
            config.heartbeat, config.loss, session.owner, self._disks.sizes,
        )  # fmt: skip
        send_struct(channel, MigrationMessage.COLO, offer)
        answer: Answer = decode(expect(channel, MigrationMessage.COLO)[1], Answer)
        if answer.version != VERSION:
            raise ChannelError(f"the secondary speaks version {answer.version} of the protocol, this one {VERSION}")

        def link(kind: LinkKind) -> socket.socket:
            return open_link(
                uri, hello_of(offer, kind), timeout=timeout, tls_creds=parameters.tls_creds,
                tls_hostname=parameters.tls_hostname,
            )  # fmt: skip

        beats = link("heartbeat")
        session.heartbeat = Heartbeat(
            beats, session.term, session.suspect, interval=config.heartbeat, loss=config.loss
        )
        if self._cards.needs_link:
            self._cards.connect(link("network"))
        if offer.disks:
            self._disks.connect(link("disks"), timeout)
        session.peer_uri = uri
        self._conversation = Conversation(channel.detach(), "primary", timeout, session.recorder)
        session.talk(self._conversation)
        session.heartbeat.start()
        self._conversation.expect(Message.CHECKPOINT_READY)

    def _copy_disks(self) -> None:
        """While the guest runs. The secondary is none before it has them."""
        if not self._disks.sizes:
            return  # and the guest need not stand still for it
        try:
            self._disks.learn()
            self._on_loop(self._side.pause)
            try:
                self._on_loop(self._disks.begin)
            finally:
                self._on_loop(self._side.go_on)
            self._disks.copy_all()
        except HostError as error:
            raise ChannelError(str(error)) from None

    # -- the loop -------------------------------------------------------------------------------

    def _serve(self) -> tuple[ExitReason, str | None]:
        """Checkpoints, until a failover is asked for, or the guest ends. ChannelError: the secondary is gone."""
        session, reason = self._session, "first"
        while True:
            if session.guest_ended:
                self._say_ended()
                return "none", None
            if session.failover_wanted:
                return session.why_wanted
            if session.closing:
                raise ChannelError("this machine is ending")
            with without_collections():
                self._checkpoint(reason)
            self._staging.prepare()
            self._free_covered()
            reason = self._wait()

    def _free_covered(self) -> None:
        """A survivor's memory is mapped privately, and what it writes is there twice: now and then, give that back."""
        now = time.monotonic()
        if now < self._free_next:
            return
        self._free_next = now + FREE_EVERY
        with contextlib.suppress(OSError):  # it is only memory
            freed = sum(region.free_covered() for region in self._side.machine.memory.regions)
            T.colo_free_covered.on and T.colo_free_covered(freed)

    def _wait(self) -> str:
        """Until the next checkpoint is due; why it is. ChannelError: the secondary said something, or nothing more."""
        session = self._session
        began = time.monotonic()
        while True:
            if session.guest_ended or session.failover_wanted or session.closing:
                return ""
            if asked := session.take_asked():
                return asked
            left = began + self._parameters().checkpoint_delay / 1000 - time.monotonic()
            if left <= 0:
                return "periodic"
            line = self._conversation.fileno()
            readable, _, _ = select.select([line, session.wake], [], [], left)
            if session.wake in readable:
                os.eventfd_read(session.wake)
            if line in readable and not session.failover_wanted:
                self._conversation.expect(idle=True)  # nothing is due: this says what is wrong

    def _checkpoint(self, reason: str) -> None:
        session, conversation, side, staging = self._session, self._conversation, self._side, self._staging
        times = CheckpointTimes(session.epoch + 1, reason or "asked", time.time())
        began = time.perf_counter()
        conversation.send(Message.CHECKPOINT_REQUEST)
        stopped = time.perf_counter()  # while the other side holds its replica, which takes as long
        try:
            copied = self._copy(times.epoch)
            resumed = None if staging.overflowed else begin_on_loop(self._post, self._go_on)
            checksum = Summed()
            state = (head_of(session.term, times.epoch, len(copied.state), running=copied.running), copied.state)
            times.size = state_size(len(copied.state))
            conversation.expect(Message.CHECKPOINT_REPLY)
            conversation.send_with(Message.VMSTATE_SEND, checksum.part(state), times.size)
            if resumed is not None:
                times.pause = resumed() - stopped
            staging.shrink(self._parameters().x_colo_delta)
            pages = pages_size(staging.size)
            conversation.send_with(Message.VMSTATE_SIZE, checksum.part(staging.pieces()), pages)
            times.size += pages
        finally:
            self._on_loop(side.go_on)
        times.pause = times.pause or time.perf_counter() - stopped
        conversation.expect(Message.VMSTATE_RECEIVED)
        times.received = time.perf_counter() - began
        session.epoch, session.runs = session.epoch + 1, copied.running
        side.machine.backend.hold.release()
        self._cards.commit(session.epoch)
        times.copy, times.save = copied.copy, copied.save
        times.pages, times.zero_pages = staging.pages, staging.zero_pages
        times.delta_pages, times.saved = staging.delta_pages, staging.saved
        conversation.expect(Message.VMSTATE_LOADED)
        times.loaded = time.perf_counter() - began
        session.counters.note(times)
        T.colo_checkpoint.on and T.colo_checkpoint(session.epoch, times.reason, times.pages, int(times.pause * 1e6))

    def _copy(self, epoch: int) -> Copied:
        """The guest stands still then."""
        for _ in range(TURNS):
            copied = self._on_loop(lambda: self._side.copy(self._staging, self._cards, self._disks, epoch))
            if copied is not None:
                return copied
        raise StateError("what the guest asked for is never seen to")

    def _go_on(self) -> float:
        self._side.go_on()
        return time.perf_counter()

    # -- the end --------------------------------------------------------------------------------

    def _say_ended(self) -> None:
        """The guest is over; the secondary is to know, or it would go on with it."""
        self._conversation.send(Message.GUEST_ENDED)
        self._conversation.expect(Message.GUEST_ENDED)
        self._on_loop(self._let_out)
        self._side.machine.backend.hold.set("pass")

    def _alone(self, reason: ExitReason, problem: str | None) -> None:
        """The pair is over. Ask the arbiter whether the guest is this side's."""
        session, side = self._session, self._side
        if reason == "none":
            session.end(reason, problem)
            return
        hold = side.machine.backend.hold
        if hold.mode == "pass":
            hold.set("hold")  # until it is known whose guest it is
        if not session.config.automatic and reason == "error":
            session.wait_for_word()
        session.begin_failover()
        try:
            won = session.claim()
        except ChannelError as error:
            session.end("error", str(error))
            raise
        session.failover.complete()
        if not won:
            reason_lost = f"the other side owns the guest since term {session.term + 1}"
            side.lose(reason_lost)
            session.end("error", reason_lost)
            raise ChannelError(reason_lost)
        self._on_loop(self._let_out)
        hold.set("pass")
        session.note_failover()
        session.end(reason, problem)

    def _let_out(self) -> None:
        self._cards.alone()
        self._disks.alone()

    def _on_loop(self, call: Callable[[], R]) -> R:
        return call_on_loop(self._post, call)

