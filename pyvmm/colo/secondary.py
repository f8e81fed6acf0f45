"""The secondary: takes checkpoint after checkpoint on the incoming migration's thread, until it is the guest.

A checkpoint is applied only once all of it is held and has been checked. From then on it counts, whatever becomes of
the primary: the secondary loads it and goes on from there. Before, what counts is where its replica is: in hybrid mode
that has answered as the guest did, in periodic mode it is the checkpoint before.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from pyvmm.colo.cards import SecondaryCards
from pyvmm.colo.checkpoint import STATE_MAX, Batch, SavedState, decode_pages, decode_state, pages_size, state_size
from pyvmm.colo.config import ColoConfig
from pyvmm.colo.disks import SecondaryDisks
from pyvmm.colo.heartbeat import Heartbeat
from pyvmm.colo.links import VERSION, Answer, LinkKind, Offer, accept_link, hello_of
from pyvmm.colo.messages import Conversation, Message
from pyvmm.colo.replica_memory import ReplicaMemory
from pyvmm.colo.replicated_machine import ReplicatedMachine
from pyvmm.colo.session import ColoLost, ColoSession, ExitReason
from pyvmm.errors import ChannelError, ConfigError, PyvmmError
from pyvmm.host.profile import load_profile
from pyvmm.machine.ending import Ending
from pyvmm.memory.guest_memory import PAGE_SIZE, GuestMemory
from pyvmm.migration.announcer import Announcer
from pyvmm.migration.channel import Channel, Listener
from pyvmm.migration.loop_call import begin_on_loop, call_on_loop
from pyvmm.migration.parameters import Parameters
from pyvmm.migration.protocol import Message as MigrationMessage
from pyvmm.migration.protocol import decode, send_struct
from pyvmm.migration.standstill import without_collections
from pyvmm.trace import trace_group

T = trace_group("colo")

R = TypeVar("R")
STATE_ROOM = state_size(STATE_MAX)
KEPT = 8 << 20
"""Bytes of the buffer that stay touched between two checkpoints."""


class PrimaryEnded(PyvmmError):
    """The guest ended at the primary by its own doing: there is nothing to take over."""


class IncomingBuffer:
    """Room for the largest checkpoint there can be of ``memory``; host memory is found for it as it is used."""

    def __init__(self, memory: GuestMemory) -> None:
        pages = memory.size // PAGE_SIZE
        largest = pages_size(memory.size + pages * 16 + PAGE_SIZE)
        self._map = mmap.mmap(-1, STATE_ROOM + largest, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        whole = memoryview(self._map)
        self.pages, self.state = whole[:largest], whole[largest:]

    def shrink(self, used: int) -> None:
        """Give back what a large checkpoint took, of whose pages ``used`` bytes are."""
        if used > KEPT:
            self._map.madvise(mmap.MADV_DONTNEED, KEPT, len(self._map) - KEPT)


class Secondary:
    """``post`` runs a callback on the machine's loop soon. ``listener`` is where further connections come."""

    def __init__(
        self,
        session: ColoSession,
        side: ReplicatedMachine,
        parameters: Callable[[], Parameters],
        post: Callable[[Callable[[], None]], None],
        listener: Listener,
        cards: SecondaryCards,
        disks: SecondaryDisks,
    ) -> None:
        self._session = session
        self._cards = cards
        self._disks = disks
        self._side = side
        self._parameters = parameters
        self._post = post
        self._listener = listener
        self._conversation: Conversation
        self._replica = ReplicaMemory(side.machine.memory, side.machine.dirty)
        self._announcer = Announcer(side.machine, parameters)

    def run(self, channel: Channel, payload: memoryview, entered: Callable[[], None]) -> None:
        """Answer the primary at the other end of ``channel``, whose offer ``payload`` is, and be its secondary;
        ``entered()`` when the two are a pair.

        Returns when the guest is this side's. ChannelError and others: it is not, and never will be.
        """
        session = self._session
        offer = self._judge(decode(payload, Offer))
        session.begin("secondary", offer.mode)
        try:
            session.pair, session.term = offer.pair, offer.term
            self._pair_up(channel, offer)
        except BaseException as error:
            self._close_streams()
            session.end("error", str(error))
            if isinstance(error, ChannelError):
                raise ChannelError(f"{error}, before there was a pair") from None
            raise
        entered()
        try:
            self._live()
        finally:
            self._close_streams()

    def _close_streams(self) -> None:
        self._cards.close()
        self._disks.close()

    def _live(self) -> None:
        """As the secondary of a pair, until the guest is this side's."""
        session = self._session
        reason: ExitReason
        problem: str | None
        try:
            self._serve()
            reason, problem = session.why_wanted
        except PrimaryEnded:
            session.end("none", None)
            self._side.end(Ending(kind="colo-ended", reason="the guest ended at the primary"))
            raise ChannelError("the guest ended at the primary") from None
        except ChannelError as error:
            if self._disks.problem is not None:
                session.end("processing", str(self._disks.problem))
                raise self._disks.problem from None
            reason, problem = session.why_wanted if session.failover_wanted else ("error", str(error))
        except PyvmmError as error:
            # A checkpoint that was held could not be put into place: neither it nor what was before it is there now.
            session.end("processing", str(error))
            raise
        session.note_suspicion()
        self._take_over(reason, problem)

    def _judge(self, offer: Offer) -> Offer:
        config: ColoConfig = self._session.config
        if offer.version != VERSION:
            raise ChannelError(f"the primary speaks version {offer.version} of the protocol, this one {VERSION}")
        if config.pair and config.pair != offer.pair:
            raise ChannelError(f"this is a secondary of the pair {config.pair}, not of {offer.pair}")
        if config.role != "secondary":
            raise ChannelError("this pyvmm was not started with --colo secondary")
        self._disks.check(offer.disks)
        if load_profile().private_memfd_works is False:
            raise ChannelError(
                "this host's KVM does not follow a private mapping of guest memory, as a secondary needs (pyvmm doctor)"
            )
        return offer

    def _pair_up(self, channel: Channel, offer: Offer) -> None:
        session, parameters = self._session, self._parameters()
        send_struct(channel, MigrationMessage.COLO, Answer(VERSION, "secondary", session.owner))

        def link(kind: LinkKind) -> socket.socket:
            return accept_link(
                self._listener, hello_of(offer, kind), timeout=offer.timeout, tls_creds=parameters.tls_creds
            )

        beats = link("heartbeat")
        with contextlib.ExitStack() as undo:
            undo.callback(beats.close)
            if self._cards.needs_link:
                self._cards.connect(link("network"))
            if offer.disks:
                self._disks.connect(link("disks"), offer.pair, offer.term)
            undo.pop_all()
        self._listener.close()  # the pair is complete: whoever else comes is to hear that at once
        try:
            session.heartbeat = Heartbeat(
                beats, session.term, session.suspect, interval=offer.heartbeat, loss=offer.loss
            )
        except ConfigError:
            beats.close()
            raise
        self._timeout = offer.timeout
        self._conversation = Conversation(channel.detach(), "secondary", offer.timeout, session.recorder)
        session.talk(self._conversation)
        self._on_loop(self._side.become_shadow)
        self._on_loop(self._cards.cut_off)
        self._on_loop(self._replica.protect)
        session.heartbeat.start()
        self._conversation.send(Message.CHECKPOINT_READY)

    # -- the loop -------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Checkpoints, until a failover is asked for. ChannelError: the primary is gone. PrimaryEnded."""
        buffer = IncomingBuffer(self._side.machine.memory)
        while not self._session.failover_wanted:
            with without_collections():
                buffer.shrink(self._take_checkpoint(buffer))

    def _take_checkpoint(self, buffer: IncomingBuffer) -> int:
        """The next one; bytes of its pages."""
        session, conversation, side = self._session, self._conversation, self._side
        if conversation.expect(Message.CHECKPOINT_REQUEST, Message.GUEST_ENDED, idle=True) is Message.GUEST_ENDED:
            session.guest_ended = True  # before the answer: then the primary's heartbeat may end
            conversation.send(Message.GUEST_ENDED)
            raise PrimaryEnded
        self._on_loop(side.suspend)
        conversation.send(Message.CHECKPOINT_REPLY)
        part = conversation.expect_with(Message.VMSTATE_SEND, buffer.state)
        state = decode_state(part, term=session.term, epoch=session.epoch + 1)
        # Checked while the pages come.
        prepared = begin_on_loop(
            self._post, lambda: side.prepare(state.sections, self._cards, self._disks, state.epoch)
        )
        payload = conversation.expect_with(Message.VMSTATE_SIZE, buffer.pages)
        batches = decode_pages(payload, state)
        self._replica.check(batches)
        apply = prepared()
        self._disks.wait_marked(state.epoch, self._timeout)
        with session.loading():
            # It is held: from here on it counts, and the primary may let out what its guest said before it.
            broken: ChannelError | None = None
            try:
                conversation.send(Message.VMSTATE_RECEIVED)
            except ChannelError as error:
                broken = error
            self._on_loop(lambda: self._load(state, batches, apply))
            session.epoch += 1
        if broken is not None:
            raise broken
        conversation.send(Message.VMSTATE_LOADED)
        if session.mode == "hybrid" and state.running:
            self._on_loop(side.run_replica)
        return len(payload)

    def _load(self, state: SavedState, batches: Sequence[Batch], apply: Callable[[], None]) -> None:
        T.colo_flush_ram_cache_begin.on and T.colo_flush_ram_cache_begin(state.epoch)
        rolled = self._replica.roll_forward(batches)
        T.colo_flush_ram_cache_end.on and T.colo_flush_ram_cache_end(state.epoch, rolled.dropped, rolled.written)
        self._session.counters.rolled_back_pages += rolled.dropped
        self._side.load(apply)
        self._session.runs = state.running

    # -- the end --------------------------------------------------------------------------------

    def _take_over(self, reason: ExitReason, problem: str | None) -> None:
        """The primary is gone, or so it seems: ask the arbiter whether the guest is this side's now."""
        session, side = self._session, self._side
        try:
            if not session.epoch:
                raise ChannelError(f"{problem or 'asked to take over'}, before there was a whole checkpoint")
            if not session.config.automatic:
                session.wait_for_word()
            side.output("hold")  # what the replica says from now on may be the guest's
            session.begin_failover()
            won = session.claim()
            session.failover.complete()
            if not won:
                raise ColoLost(f"the other side owns the guest since term {session.term + 1}")
        except PyvmmError as error:
            side.output("discard")  # nobody is to wait for it
            session.end("error", str(error))
            raise
        if self._disks:
            self._on_loop(side.suspend)
            self._on_loop(self._disks.take_over)
        self._on_loop(self._replica.release)
        self._on_loop(self._cards.take_over)
        self._on_loop(lambda: side.emerge(running=session.runs))
        session.note_failover()
        self._on_loop(self._announcer.start)
        session.end(reason, problem)

    def _on_loop(self, call: Callable[[], R]) -> R:
        return call_on_loop(self._post, call)
