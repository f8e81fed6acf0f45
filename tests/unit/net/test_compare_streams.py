"""Two TCP streams cut, repeated, shuffled and mixed in any way, against a model that knows every byte."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from hypothesis import event, given, settings
from hypothesis import strategies as st

from pyvmm.net.compare import Compare, Mode, Reason
from pyvmm.net.filter import Frame
from tests.unit.net.packets import ACK, FIN, SYN, Segment

CLIENT = 0xFFFFFFE0
"""The client's sequence numbers wrap, too."""


@dataclass
class Sent:
    """A segment as the model has it: positions count from the first byte, the end of the stream is one, too."""

    start: int
    end: int
    ack: int
    frame: Frame


@dataclass
class Model:
    """What must have been released: no queues, no serial numbers; every position's symbol by side."""

    base: int
    """The sequence number of the stream's first byte."""
    epoch: int = 1
    compared: int = 1
    symbols: tuple[dict[int, int], dict[int, int]] = field(default_factory=lambda: ({}, {}))
    acks: list[int] = field(default_factory=lambda: [1, 1])
    told: int = 1
    """What a client knows to be acknowledged."""
    last: int = 0
    frontier: int = 0
    diverged: bool = False
    held: list[tuple[int, Sent, dict[int, int]]] = field(default_factory=list)
    early: list[tuple[Sent, dict[int, int]]] = field(default_factory=list)

    def primary(self, sent: Sent, symbols: dict[int, int]) -> list[Frame]:
        self.held.append((self.epoch, sent, symbols))
        if self.epoch == self.compared:
            self._learn(0, sent, symbols)
        return self._released()

    def secondary(self, sent: Sent, symbols: dict[int, int], epoch: int) -> list[Frame]:
        if epoch > self.compared:
            self.early.append((sent, symbols))
        elif epoch == self.compared and not self.diverged:
            self._learn(1, sent, symbols)
            return self._released([sent])
        return self._released()

    def commit(self) -> list[Frame]:
        out = [sent.frame for epoch, sent, _ in self.held if epoch < self.epoch]
        self.held = [each for each in self.held if each[0] >= self.epoch]
        self.compared, self.diverged = self.epoch, False
        self.symbols = ({}, {})
        self.frontier, self.acks[1] = self.last, self.acks[0]
        self.told = self.acks[0]
        for _, sent, symbols in self.held:
            self._learn(0, sent, symbols)
        for sent, symbols in self.early:
            self._learn(1, sent, symbols)
        early, self.early = [sent for sent, _ in self.early], []
        return out + self._released(early)

    def _learn(self, side: int, sent: Sent, symbols: dict[int, int]) -> None:
        self.symbols[side].update(symbols)
        self.acks[side] = max(self.acks[side], sent.ack)
        if side == 0:
            self.last = max(self.last, sent.end)

    def _released(self, theirs_now: Sequence[Sent] = ()) -> list[Frame]:
        ours, theirs = self.symbols
        while not self.diverged and self.frontier in ours and self.frontier in theirs:
            self.diverged = ours[self.frontier] != theirs[self.frontier]
            self.frontier += not self.diverged
        if self.diverged:
            return []
        done = [
            epoch == self.compared and sent.ack <= self.acks[1] and sent.end <= max(self.frontier, sent.start)
            for epoch, sent, _ in self.held
        ]
        out = [sent for (_, sent, _), ready in zip(self.held, done, strict=True) if ready]
        self.held = [each for each, ready in zip(self.held, done, strict=True) if not ready]
        self.told = max([self.told, *(sent.ack for sent in out)])
        return [sent.frame for sent in out] + list(self._acknowledged(theirs_now))

    def _acknowledged(self, theirs_now: Sequence[Sent]) -> Iterator[Frame]:
        """If something waits only for the secondary to acknowledge as much: its bare segments, and what is common."""
        waits = [
            sent
            for epoch, sent, _ in self.held
            if epoch == self.compared and sent.end <= max(self.frontier, sent.start) and sent.ack > self.acks[1]
        ]
        for sent in theirs_now if waits else ():
            if sent.start == sent.end and sent.ack >= self.told:
                self.told = sent.ack
                yield Segment(self.base + min(sent.start, self.frontier), CLIENT + self.told).frame()
        if waits and self.acks[1] > self.told:
            self.told = self.acks[1]
            yield Segment(self.base + min(waits[0].start, self.frontier), CLIENT + self.told).frame()


END = 256
"""The symbol of a FIN."""


def segment(base: int, stream: list[int], start: int, size: int, ack: int) -> tuple[Sent, dict[int, int]]:
    """``base``: the sequence number of the stream's first byte."""
    start = min(start, len(stream))
    symbols = dict(enumerate(stream[start : start + size], start))
    payload = bytes(each for each in symbols.values() if each != END)
    flags = ACK | (FIN if END in symbols.values() else 0)
    frame = Segment(base + start, CLIENT + ack, flags, payload).frame()
    return Sent(start, start + len(symbols), ack, frame), symbols


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    ours = list(draw(st.binary(min_size=1, max_size=40))) + [END] * draw(st.integers(0, 1))
    theirs = list(ours)
    for _ in range(draw(st.sampled_from([0, 0, 0, 1]))):
        at = draw(st.integers(0, len(theirs) - 1))
        theirs[at] = draw(st.integers(0, END))
        if theirs[at] == END:
            del theirs[at + 1 :]
    return ours, theirs


NUMBERS = st.integers(0, 2**32 - 1)
PIECES = st.tuples(st.sampled_from([0, 0, 1, 1, 1, 2, 3]), st.integers(0, 40), st.integers(0, 20), st.integers(1, 50))


@settings(max_examples=300)
@given(NUMBERS | st.just(2**32 - 20), NUMBERS, streams(), st.lists(PIECES, max_size=25))
def test_what_is_released_is_what_both_have_sent(
    isn: int, other: int, both: tuple[list[int], list[int]], pieces: list[tuple[int, int, int, int]]
) -> None:
    compare, model = Compare(), Model(isn + 1)
    compare.set_mode(Mode.HYBRID, 1, 0)
    compare.primary(Segment(isn, CLIENT + 1, SYN | ACK).frame(), 0)
    compare.secondary(Segment(other, CLIENT + 1, SYN | ACK).frame(), 1, 0)
    assert len(compare.release()) == 1
    whole = [(0, 0, 41, 60), (1, 0, 41, 60)]

    for kind, start, size, ack in pieces + whole:
        if kind == 0:
            sent, symbols = segment(isn + 1, both[0], start, size, ack)
            assert compare.primary(sent.frame, 0)
            assert compare.release() == model.primary(sent, symbols)
        elif kind == 1:
            sent, symbols = segment(isn + 1, both[1], start, size, ack)
            # While a checkpoint is under way: of the epoch that ended, or of the new one, which it may already run.
            epoch = model.epoch if not model.early and start % 2 else model.compared if not model.early else model.epoch
            compare.secondary(sent.frame, epoch, 0)
            assert compare.release() == model.secondary(sent, symbols, epoch)
        elif model.epoch == model.compared:
            model.epoch += 1
            compare.begin_epoch(model.epoch)
        elif kind == 2:
            compare.commit(model.epoch, 0)
            assert compare.release() == model.commit()
        due = compare.checkpoint_due
        assert (due is not None) == (model.diverged and model.epoch == model.compared)
        if due is not None:
            assert due.reason in (Reason.PAYLOAD, Reason.FIN)
            assert due.position == (isn + 1 + model.frontier) & 0xFFFFFFFF
    event(f"diverged {model.diverged}, epochs {min(model.epoch, 3)}")
    if both[0] == both[1] and model.epoch == model.compared:
        assert not model.held and compare.connections()[0].waiting == (0, 0)
    compare.set_mode(Mode.PASS, 0, 0)
    assert compare.release() == [sent.frame for _, sent, _ in model.held], "nothing is ever lost"
