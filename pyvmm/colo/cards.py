"""The network cards of a protected guest: what it sends waits at the primary until the secondary's is the same.

::

            clients                                               primary | secondary
    tap --> filter-mirror --> [rewriter] --> guest      input, epoch N    |---> redirector --> rewriter --> replica
    tap <-- colo-compare <--- [rewriter] <-- guest      output, epoch N   <---| redirector <-- rewriter <-- replica

The rewriter in brackets is there when this primary has been a secondary itself. The secondary's tap is down until it
takes over. In periodic mode there is no replica that runs: colo-compare only holds, and nothing crosses.

Epochs. All of a chain's frames are of the epoch in which its guest got or sent them. The primary's chains change to the
next one together, while the guest stands still for the checkpoint; a frame that the mirror has passed but the guest has
not got is mirrored again, because the secondary forgets what it has not given to its replica by then. The secondary
keeps input of a checkpoint that it has not loaded. COLO.md, rules 3 and 4.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import Meta

from pyvmm.colo.frame_link import FrameLink
from pyvmm.colo.session import ColoSession
from pyvmm.devices.state import decode_fields
from pyvmm.errors import ChannelError, SectionError, StateError
from pyvmm.migration.sections import Section
from pyvmm.net.colo_compare import ColoCompare
from pyvmm.net.compare import CheckpointDue, CompareTunables, Mode
from pyvmm.net.filter import Direction, FilterChain, Frame
from pyvmm.net.frame_stream import EpochFrame, encode
from pyvmm.net.mirror import FilterMirror, FilterRedirector
from pyvmm.net.rewriter import FilterRewriter
from pyvmm.trace import trace_group

if TYPE_CHECKING:
    import socket

    from pyvmm.machine.machine import Machine
    from pyvmm.virtio.net import VirtioNet

T = trace_group("colo")

MODES = {"hybrid": Mode.HYBRID, "periodic": Mode.HOLD}
AHEAD_MAX = 16 << 20
"""Bytes of input that the secondary keeps for a checkpoint that is on its way."""
WAITING_MAX = 4096
"""Frames that wait for a replica that does not take them."""
OUTPUT_MAX = 4096
"""Frames of a secondary whose line is gone and who may not speak yet."""
SECTION = "proxy"
VERSION = 1


class ProxyState(msgspec.Struct, frozen=True):
    """What a secondary's rewriters must know of the primary's: records, for each card."""

    rewriters: Annotated[tuple[Annotated[bytes, Meta(max_length=8 << 20)], ...], Meta(max_length=64)]


def cards_of(machine: Machine) -> list[VirtioNet]:
    """In the machine's order; both sides have the same ones."""
    from pyvmm.machine.virtio_slots import virtio_devices
    from pyvmm.virtio.net import VirtioNet

    return virtio_devices(machine, VirtioNet)


def rewriter_of(chain: FilterChain) -> FilterRewriter | None:
    """That of a guest that has lived through a failover here."""
    return next((each for each in chain.filters if isinstance(each, FilterRewriter)), None)


@contextlib.contextmanager
def _locked(cards: Sequence[VirtioNet]) -> Iterator[None]:
    """No frame moves in any chain; nobody else holds two of these locks."""
    with contextlib.ExitStack() as stack:
        for card in cards:
            stack.enter_context(card.filters.lock)
        yield


class _Proxy:
    """One card's filters at the primary."""

    def __init__(self, number: int, owner: PrimaryCards, tunables: CompareTunables) -> None:
        self._number, self._owner = number, owner
        self.epoch = 0
        self.compare = ColoCompare(owner.wanted, tunables)
        self.mirror = FilterMirror(self._mirrored)

    def _mirrored(self, direction: Direction, frame: Frame) -> None:
        self._owner.send(encode(direction, self.epoch, frame, self._number))


class PrimaryCards:
    """Of a primary. On the replication's thread, but for what says otherwise."""

    def __init__(self, machine: Machine, session: ColoSession, tunables: CompareTunables) -> None:
        self._cards = cards_of(machine)
        self._session = session
        self._proxies = [_Proxy(number, self, tunables) for number in range(len(self._cards))]
        self._link: FrameLink | None = None
        self._installed = False

    @property
    def needs_link(self) -> bool:
        """Whether frames are to cross: there are cards, and a replica that runs."""
        return bool(self._cards) and self._session.mode == "hybrid"

    def connect(self, sock: socket.socket) -> None:
        """The connection for frames."""
        every = self._session.config.compare.expired_scan_cycle / 1000
        self._link = FrameLink(sock, self._take, self._session.suspect, self._scan, every)
        self._link.start()

    def begin_epoch(self, epoch: int) -> None:
        """The guest stands still for the checkpoint that starts it, and devices are at rest. On the loop."""
        mode = MODES[self._session.mode]
        with _locked(self._cards):
            for card, proxy in zip(self._cards, self._proxies, strict=True):
                if self._installed:
                    proxy.compare.begin_epoch(epoch)
                else:
                    card.filters.add(proxy.compare)
                    if mode is Mode.HYBRID:
                        card.filters.add(proxy.mirror)
                    proxy.compare.set_mode(mode, epoch)
            self._installed = True
            for card, proxy in zip(self._cards, self._proxies, strict=True):
                proxy.epoch = epoch
                if mode is Mode.HYBRID:
                    proxy.mirror.again(len(card.filters.to_guest))

    def sections(self) -> list[Section]:
        """What the secondary's rewriters have to know; the guest stands still. On the loop."""
        if not self._cards:
            return []
        rewriters = [rewriter_of(card.filters) for card in self._cards]
        records = [each.rewriter.records() if each is not None else b"" for each in rewriters]
        return [Section(SECTION, VERSION, msgspec.structs.asdict(ProxyState(tuple(records))))]

    def commit(self, epoch: int) -> None:
        """``vmstate-received``: the secondary has all that the guest has said before ``epoch``."""
        for proxy in self._proxies:
            proxy.compare.commit(epoch)

    def alone(self) -> None:
        """The guest is this side's, or is over: what it says goes to clients. On the loop."""
        if self._installed:
            self._installed = False
            for card, proxy in zip(self._cards, self._proxies, strict=True):
                card.filters.remove(proxy.compare)
                if proxy.mirror in card.filters.filters:
                    card.filters.remove(proxy.mirror)

    def close(self) -> None:
        """Nothing crosses any more. What is held stays so, unless :meth:`alone` was called."""
        if self._link is not None:
            self._link.stop()

    def send(self, data: bytes) -> None:
        """A frame of the mirror's, under its chain's lock. Any thread."""
        if self._link is not None and not self._link.send(data) and not self._link.broken:
            self._ask("mirror-full")  # the replica lacks it, and is put right

    def wanted(self, due: CheckpointDue) -> None:
        """Any thread."""
        self._session.note_difference(str(due))
        self._ask(due.reason.name.lower().replace("_", "-"))

    def _ask(self, reason: str) -> None:
        with contextlib.suppress(StateError):  # it is no pair any more
            self._session.ask_checkpoint(reason)

    def statistics(self) -> list[dict[str, int]]:
        """colo-compare's counters, for each card. Any thread."""
        return [proxy.compare.compare.counters() for proxy in self._proxies]

    def _take(self, each: EpochFrame) -> None:
        if each.card >= len(self._proxies) or each.direction is not Direction.TX:
            raise ChannelError(f"the secondary sent a frame of card {each.card}, {each.direction.value}")
        self._proxies[each.card].compare.secondary(each.frame, each.epoch)

    def _scan(self) -> None:
        for proxy in self._proxies:
            proxy.compare.scan()


class SecondaryCards:
    """Of a secondary. On the loop, but for what says otherwise."""

    def __init__(self, machine: Machine, session: ColoSession) -> None:
        self._cards = cards_of(machine)
        self._session = session
        self._redirectors: list[FilterRedirector] = []
        self._link: FrameLink | None = None
        self._epoch = 0
        self._lock = threading.Lock()  # of the three below; taken before any chain's
        self._ahead: deque[EpochFrame] = deque()
        self._ahead_size = 0
        self._output: list[deque[Frame]] = [deque(maxlen=OUTPUT_MAX) for _ in self._cards]

    @property
    def needs_link(self) -> bool:
        """As the primary's."""
        return bool(self._cards) and self._session.mode == "hybrid"

    def connect(self, sock: socket.socket) -> None:
        """The connection for frames. On the replication's thread."""
        self._link = FrameLink(sock, self._take, self._session.suspect)
        self._link.start()

    def cut_off(self) -> None:
        """From now on the guest here hears the primary only, and speaks to nobody else."""
        for number, card in enumerate(self._cards):
            redirector = FilterRedirector(self._redirect_for(number))
            if rewriter_of(card.filters) is None:
                card.filters.add(FilterRewriter(), 0)
            card.filters.add(redirector)
            self._redirectors.append(redirector)

    def _redirect_for(self, number: int) -> Any:
        def redirect(direction: Direction, frame: Frame) -> None:
            link = self._link
            if link is None:
                return
            if not link.send(encode(direction, self._epoch, frame, number)) and link.broken:
                self._output[number].append(frame)  # until it is known whose guest it is

        return redirect

    def decode(self, sections: dict[str, Section]) -> list[bytes]:
        """Take what the primary's :meth:`PrimaryCards.sections` gave out of ``sections``. SectionError."""
        if not self._cards:
            return []
        section = sections.pop(SECTION, None)
        if section is None:
            raise SectionError(SECTION, "name", "the section is missing")
        if section.version != VERSION:
            raise SectionError(SECTION, "version", f"{section.version}; this side knows {VERSION}")
        state = decode_fields(SECTION, ProxyState, section.data)
        if len(state.rewriters) != len(self._cards):
            raise SectionError(SECTION, "rewriters", f"{len(state.rewriters)} for {len(self._cards)} cards")
        return list(state.rewriters)

    def load(self, epoch: int, records: Sequence[bytes]) -> None:
        """The replica, which stands still, has this checkpoint's state: it is to get what the primary's gets from there
        on. ChannelError: ``records`` are none.
        """
        with self._lock, _locked(self._cards):
            for card, record in zip(self._cards, records, strict=True):
                card.filters.forget()
                rewriter = rewriter_of(card.filters)
                assert rewriter is not None
                rewriter.rewriter.checkpoint(_now(), record)
            self._epoch = epoch
            for output in self._output:
                output.clear()
            self._deliver_ahead(epoch)

    def _deliver_ahead(self, epoch: int | None) -> None:
        """What was kept for ``epoch``, or all of it; older frames are gone with their epochs."""
        while self._ahead and (epoch is None or self._ahead[0].epoch <= epoch):
            each = self._ahead.popleft()
            if epoch is None or each.epoch == epoch:
                self._deliver(each)
        self._ahead_size = sum(len(each.frame.data) for each in self._ahead)

    def take_over(self) -> None:
        """The guest is this side's: from now on it hears and speaks to clients itself."""
        self.close()  # nothing of the primary's counts any more
        with self._lock:
            self._deliver_ahead(None)
        for card, redirector, output in zip(self._cards, self._redirectors, self._output, strict=True):
            card.arriving()
            with card.filters.lock:
                for frame in output:
                    card.filters.emit(frame)
                card.filters.remove(redirector)
            output.clear()
        self._redirectors.clear()

    def close(self) -> None:
        """Nothing crosses any more. Not on the link's thread."""
        if self._link is not None:
            self._link.stop()

    def _take(self, each: EpochFrame) -> None:
        """On the link's thread."""
        if each.card >= len(self._cards) or each.direction is not Direction.RX:
            raise ChannelError(f"the primary sent a frame of card {each.card}, {each.direction.value}")
        with self._lock:
            if each.epoch == self._epoch:
                self._deliver(each)
            elif each.epoch > self._epoch:
                size = len(each.frame.data)
                if self._ahead_size + size <= AHEAD_MAX:  # else it is lost, answers differ, and a checkpoint comes
                    self._ahead.append(each)
                    self._ahead_size += size

    def _deliver(self, each: EpochFrame) -> None:
        chain = self._cards[each.card].filters
        if self._redirectors and chain.waiting < WAITING_MAX:
            self._redirectors[each.card].deliver(Direction.RX, each.frame)


def _now() -> int:
    return int(time.monotonic() * 1000)
