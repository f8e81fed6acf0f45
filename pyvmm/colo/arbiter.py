"""Who owns the guest: one register outside both hosts, changed by compare-and-swap (rule 5 of the COLO protocol).

The register of a pair of VMs holds ``(term, state, owner)``. While they protect each other it says *protected*; before
either acts alone it must change ``(term, protected, ...)`` to ``(term + 1, solo, me)``. One of two that try wins, for
ever: the other finds a later term, stops its guest and sends nothing any more. No lease, so no clock to trust.

A claim whose answer is lost is simply made again: the register then says *solo, me*, and that is the answer.

``etcd:HOST:PORT[,HOST:PORT...]``   several hosts; one transaction of etcd's v3 API through its JSON gateway
``file:PATH``                       shared storage of one host; a stopped process that holds the lock blocks the other
``none``                            nobody is asked, and a cut line makes two owners: has to be said
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Literal, Protocol

import msgspec

from pyvmm.errors import ConfigError, HostError, StateError
from pyvmm.trace import trace_group

T = trace_group("colo")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
"""Of a pair and of an owner: they become keys and file names."""
TERM_MAX = 2**63 - 1
REGISTER_MAX = 4096
"""Bytes of a stored register; more is not one of ours."""
RETRY = 0.02
"""Seconds between two tries while the arbiter is away."""


class ArbiterAway(HostError):
    """It cannot be asked now, or its answer got lost: nothing is known. Hold the output and try again."""


class Register(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the arbiter keeps for a pair. ``owner`` is who runs it alone; empty while ``protected``."""

    term: int
    state: Literal["protected", "solo"]
    owner: str = ""


class Arbiter(Protocol):
    """Where registers are kept. ``seconds`` bounds each call; ArbiterAway after that."""

    def read(self, pair: str, seconds: float) -> Register | None:
        """The register of ``pair``, None if there is none yet."""

    def compare_and_swap(self, pair: str, old: Register | None, new: Register, seconds: float) -> bool:
        """Make it ``new`` if it is ``old``; was it? ArbiterAway also if it may have been changed without us knowing."""


class NoArbiter:
    """Everybody wins. For tests of one side, and for people who say they want it."""

    def read(self, pair: str, seconds: float) -> Register | None:
        """Nothing is ever stored."""
        return None

    def compare_and_swap(self, pair: str, old: Register | None, new: Register, seconds: float) -> bool:
        """Nobody is asked."""
        return True


@dataclass(frozen=True)
class Ownership:
    """One side's view of a pair: its name there, and the term in which it was protected."""

    arbiter: Arbiter
    pair: str
    me: str

    def __post_init__(self) -> None:
        for what, name in (("pair", self.pair), ("name", self.me)):
            if not NAME.fullmatch(name):
                raise ConfigError(f"COLO: the {what} {name!r} has to be letters, digits, . _ - and at most 63 long")

    def begin_pair(self, seconds: float) -> int:
        """The two protect each other from now on: returns the term. StateError: somebody else's VM owns the pair.

        The owner of a pair (the survivor that is protected again) may; a pair nobody has used yet may be begun.
        """
        now = self.arbiter.read(self.pair, seconds)
        if now is not None and now.state == "protected":
            return now.term
        if now is not None and now.owner != self.me:
            raise StateError(f"the pair {self.pair} belongs to {now.owner} since term {now.term}")
        term = now.term + 1 if now is not None else 1
        new = Register(term, "protected")
        if self.arbiter.compare_and_swap(self.pair, now, new, seconds) or self.arbiter.read(self.pair, seconds) == new:
            T.colo_ownership.on and T.colo_ownership(self.pair, term, "protected", self.me)
            return term
        raise StateError(f"the pair {self.pair} was taken by somebody else at this moment")

    def claim(self, term: int, seconds: float) -> bool:
        """May this side act alone? Asked again until there is an answer.

        True: it owns the pair, in ``term + 1``. False, for ever: the other side does; stop the guest, send nothing.
        ArbiterAway: no answer within ``seconds``; output stays held, the caller asks again.
        """
        old, new = Register(term, "protected"), Register(term + 1, "solo", self.me)
        until = time.monotonic() + seconds
        while True:
            left = until - time.monotonic()
            try:
                won = self.arbiter.compare_and_swap(self.pair, old, new, max(left, 0.001))
                if not won:
                    # Perhaps an earlier try of ours was carried out and only its answer got lost.
                    won = self.arbiter.read(self.pair, max(until - time.monotonic(), 0.001)) == new
                T.colo_ownership.on and T.colo_ownership(self.pair, term + 1, "solo" if won else "lost", self.me)
                return won
            except ArbiterAway:
                if until - time.monotonic() < RETRY:
                    raise
                time.sleep(RETRY)


def decode_register(stored: bytes, where: str) -> Register:
    """What somebody stored, judged: HostError if it is not a register."""
    try:
        if len(stored) > REGISTER_MAX:
            raise msgspec.ValidationError(f"{len(stored)} bytes long")
        register = msgspec.json.decode(stored, type=Register)
        if not 1 <= register.term <= TERM_MAX:
            raise msgspec.ValidationError(f"term {register.term}")
        if (register.state == "protected") != (register.owner == ""):
            raise msgspec.ValidationError(f"{register.state} with owner {register.owner!r}")
    except msgspec.DecodeError as error:
        raise HostError(f"{where}: not a register of COLO's ({error}); move it away if it is not needed") from None
    return register


def arbiter_from(text: str) -> Arbiter:
    """From ``--arbiter``. ConfigError names what is wrong with it."""
    kind, _, rest = text.partition(":")
    if kind == "none" and not rest:
        return NoArbiter()
    if kind == "file" and rest:
        from pyvmm.colo.arbiter_file import FileArbiter

        return FileArbiter(rest)
    if kind == "etcd" and rest:
        from pyvmm.colo.arbiter_etcd import EtcdArbiter

        return EtcdArbiter(rest)
    raise ConfigError(f"--arbiter {text!r}: has to be etcd:HOST:PORT[,HOST:PORT...], file:PATH or none")
