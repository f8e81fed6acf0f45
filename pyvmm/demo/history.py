"""Is what clients saw what *one* store could have answered, each request at one moment while it was under way?

That is linearizability (Herlihy and Wing, 1990). A guest that failed over, and lost nothing that it had acknowledged,
cannot be told from one that never did. Each object is looked at by itself, which is enough (ibid., theorem 1).

The log. An append is answered with its number, a look with how many entries there are. So each operation has a place:
append N is between look N and look N + 1, and only the order in time can contradict: an operation that was answered
before another one was asked must not come behind it.

The register. An order is searched for that explains what was read, with memory of what was tried (Wing and Gong, 1993;
Lowe, 2017). A request without an answer may have been carried out at any time since it was asked, or never.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

APPEND, ENTRY, LENGTH, WRITE, READ = "append", "entry", "length", "write", "read"


@dataclass(frozen=True, slots=True)
class Operation:
    """``asked`` and ``answered``: moments of one clock; infinity: never answered. ``value`` is what was sent or, for a
    look, seen; ``place`` the number that an append or a look at the log is about.
    """

    client: int
    kind: str
    asked: float
    answered: float = math.inf
    value: bytes = b""
    place: int | None = None

    def __str__(self) -> str:
        what = f"{self.kind} {self.place if self.place is not None else ''}".strip()
        end = f"{self.answered:.4f}" if self.answered < math.inf else "never"
        return f"client {self.client}: {what} {self.value[:24]!r} ({self.asked:.4f} to {end})"


def log_problem(operations: Iterable[Operation], content: Mapping[int, bytes] | None = None) -> str | None:
    """What no log could have answered, in one line; ``None``: nothing. ``content``: all of it, read at last.

    The log was empty at first, and no two appends have the same value: so an entry says which append it is.
    """
    found = [one for one in operations if one.kind in (APPEND, ENTRY, LENGTH)]
    answered = [one for one in found if one.place is not None and one.answered < math.inf]
    by_place: dict[int, Operation] = {}
    for one in answered:
        if one.kind == APPEND and (other := by_place.setdefault(one.place or 0, one)) is not one:
            return f"two appends are entry {one.place}: {other}; {one}"
    seen = dict(content or {})
    for one in answered:
        if one.kind == ENTRY and seen.setdefault(one.place or 0, one.value) != one.value:
            return f"entry {one.place} has changed: {one}"
    unanswered = {one.value: one for one in found if one.kind == APPEND and one.place is None}
    placed = {one.value: one for one in by_place.values()}
    for place, value in seen.items():
        if place in by_place:
            if by_place[place].value != value:
                return f"entry {place} is {value[:24]!r}, and was acknowledged as another: {by_place[place]}"
        elif value in placed:
            return f"entry {place} is there a second time: {placed[value]}"
        elif value not in unanswered:
            return f"entry {place} was never asked for: {value[:24]!r}"
        else:  # nobody was told, but it happened: it has its place in the order of time like any other
            placed[value] = dataclasses.replace(unanswered[value], place=place)
    appends = [one for one in placed.values() if one.answered == math.inf]
    return _end_problem(answered, content) or _order_problem([*answered, *appends]) or _count_problem(found)


def _end_problem(answered: Iterable[Operation], content: Mapping[int, bytes] | None) -> str | None:
    """What was acknowledged or seen is there at last, and so is all before it."""
    if content is None:
        return None
    for one in answered:
        if _least(one) > len(content):
            what = "an acknowledged append is gone" if one.kind == APPEND else "what was seen is gone"
            return f"{what}, of {len(content)} entries at last: {one}"
    hole = next((place for place in range(len(content)) if place not in content), None)
    return None if hole is None else f"there is no entry {hole}, but {len(content)} others"


def _count_problem(found: Iterable[Operation]) -> str | None:
    """Nobody sees more entries than had been asked for."""
    asked = sorted(one.asked for one in found if one.kind == APPEND)
    for one in found:
        if one.place is not None and one.answered < math.inf and _least(one) > bisect.bisect(asked, one.answered):
            return f"more entries than anybody had asked for: {one}"
    return None


def _order_problem(operations: Sequence[Operation]) -> str | None:
    """Whoever was answered before another was asked must not have a place behind it."""
    by_answer = sorted(operations, key=lambda one: one.answered)
    furthest: Operation | None = None
    at = 0
    for one in sorted(operations, key=lambda one: one.asked):
        while at < len(by_answer) and by_answer[at].answered < one.asked:
            before = by_answer[at]
            if furthest is None or _least(before) > _least(furthest):
                furthest = before
            at += 1
        if furthest is not None and _least(furthest) > _most(one):
            return f"a later request saw an earlier log: {furthest}, and then {one}"
    return None


def _least(one: Operation) -> int:
    """Entries that there must be once it was answered."""
    assert one.place is not None
    return one.place if one.kind == LENGTH else one.place + 1


def _most(one: Operation) -> float:
    """Entries that there can have been before it."""
    assert one.place is not None
    return math.inf if one.kind == ENTRY else one.place


def register_problem(operations: Iterable[Operation], initial: bytes = b"") -> str | None:
    """What no register could have answered, in one line; ``None``: nothing."""
    ours = [one for one in operations if one.kind in (WRITE, READ)]
    # A read that was never answered says nothing; a write may have happened.
    ours = sorted((one for one in ours if one.kind == WRITE or one.answered < math.inf), key=lambda one: one.asked)
    seen: set[tuple[int, int, bytes]] = set()
    stack = [(0, 0, initial)]
    furthest = 0
    while stack:
        state = stack.pop()
        if state in seen:
            continue
        seen.add(state)
        low, mask, value = state
        furthest = max(furthest, low)
        steps, first = _candidates(ours, low, mask)
        if first == math.inf:
            return None  # all that was answered has its place
        for at in steps:
            one = ours[at]
            if one.kind == WRITE or one.value == value:
                after = one.value if one.kind == WRITE else value
                stack.append((*_without_prefix(low, mask | 1 << (at - low)), after))
    return f"no order of the requests explains what was read, from about {ours[furthest]}"


def _candidates(operations: Sequence[Operation], low: int, mask: int) -> tuple[list[int], float]:
    """What may come next, if all before ``low`` and those in ``mask``, from there on, are done: what was asked before
    any other one was answered; and when that was.
    """
    first, steps = math.inf, []
    for at in range(low, len(operations)):
        one = operations[at]
        if one.asked > first:
            break
        if not mask >> (at - low) & 1:
            steps.append(at)
            first = min(first, one.answered)
    return [at for at in steps if operations[at].asked <= first], first


def _without_prefix(low: int, mask: int) -> tuple[int, int]:
    while mask & 1:
        low, mask = low + 1, mask >> 1
    return low, mask
