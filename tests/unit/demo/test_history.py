"""The history checker: it believes what a real store answered, and finds what is wrong."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvmm.demo.history import APPEND, ENTRY, LENGTH, READ, WRITE, Operation, log_problem, register_problem


def history(seed: int, clients: int = 4, count: int = 60, unanswered: float = 0.1) -> list[Operation]:
    """What clients see of one store: each request is carried out at some moment between asked and answered."""
    rng = random.Random(seed)
    free = [0.0] * clients
    planned = []
    for number in range(count):
        client = rng.randrange(clients)
        asked = free[client] + rng.random()
        carried_out = asked + rng.random() * 2
        answered = carried_out + rng.random() * 2
        free[client] = answered + rng.random() * 0.01
        kind = rng.choice((APPEND, APPEND, ENTRY, LENGTH, WRITE, READ, READ))
        planned.append((carried_out, Operation(client, kind, asked, answered, b"%d" % number)))
    log: list[bytes] = []
    register = b""
    seen = []
    for _, one in sorted(planned, key=lambda pair: pair[0]):
        lost = rng.random() < unanswered
        place: int | None = None
        value = one.value
        if one.kind == APPEND:
            place = len(log)
            log.append(one.value)
            if lost and rng.random() < 0.5:
                log.pop()  # never carried out
        elif one.kind == LENGTH:
            place, value = len(log), b""
        elif one.kind == ENTRY:
            if not log:
                continue
            place = rng.randrange(len(log))
            value = log[place]
        elif one.kind == WRITE:
            register = one.value if not lost or rng.random() < 0.5 else register
        else:
            value = register
        if lost:
            if one.kind in (APPEND, WRITE):
                seen.append(dataclasses.replace(one, answered=math.inf, place=None))
            continue
        seen.append(dataclasses.replace(one, value=value, place=place))
    return seen


@settings(max_examples=150)
@given(st.integers(0, 1 << 32))
def test_a_real_store_is_believed(seed: int) -> None:
    seen = history(seed)
    assert log_problem(seen) is None
    assert register_problem(seen) is None


def test_a_long_history_takes_no_time() -> None:
    assert register_problem(history(1, clients=4, count=20_000, unanswered=0)) is None


def op(kind: str, asked: float, answered: float, value: bytes = b"", place: int | None = None) -> Operation:
    return Operation(1, kind, asked, answered, value, place)


@pytest.mark.parametrize(
    ("operations", "content", "said"),
    [
        ([op(APPEND, 0, 1, b"a", 0)], {}, "an acknowledged append is gone"),
        ([op(APPEND, 0, 1, b"a", 0), op(APPEND, 2, 3, b"b", 0)], None, "two appends are entry 0"),
        ([op(APPEND, 0, 1, b"a", 0)], {0: b"x"}, "was acknowledged as another"),
        ([op(APPEND, 0, 1, b"a", 0)], {0: b"a", 1: b"a"}, "is there a second time"),
        ([op(APPEND, 0, 1, b"a", 0)], {0: b"a", 1: b"x"}, "was never asked for"),
        ([op(APPEND, 0, 1, b"a", 1), op(APPEND, 2, 3, b"b", 0)], None, "a later request saw an earlier log"),
        ([op(APPEND, 0, 1, b"a", 0), op(LENGTH, 2, 3, place=0)], None, "a later request saw an earlier log"),
        ([op(LENGTH, 0, 1, place=2), op(LENGTH, 2, 3, place=1)], None, "a later request saw an earlier log"),
        ([op(ENTRY, 0, 1, b"a", 0), op(APPEND, 2, 3, b"a", 0)], None, "a later request saw an earlier log"),
        ([op(ENTRY, 0, 1, b"a", 0), op(ENTRY, 2, 3, b"b", 0), op(APPEND, 0, 9, b"a")], None, "has changed"),
        ([op(APPEND, 0, math.inf, b"a"), op(ENTRY, 1, 2, b"a", 0)], {}, "what was seen is gone"),
        ([op(APPEND, 0, math.inf, b"a"), op(LENGTH, 1, 2, place=1)], {}, "what was seen is gone"),
        ([op(APPEND, 0, math.inf, b"a")], {0: b"a", 1: b"a"}, "is there a second time"),
        ([op(APPEND, 0, math.inf, b"a")], {1: b"a"}, "there is no entry 0"),
        ([op(APPEND, 0, 1, b"b", 1), op(APPEND, 0, 9, b"c", 0), op(APPEND, 10, math.inf, b"a")],
         {0: b"a", 1: b"b"}, "was acknowledged as another"),
        ([op(APPEND, 0, 1, b"b", 1), op(APPEND, 10, math.inf, b"a")],
         {0: b"a", 1: b"b"}, "a later request saw an earlier log"),
        ([op(APPEND, 0, 1, b"b", 1), op(APPEND, 0, math.inf, b"c"), op(APPEND, 10, math.inf, b"a")],
         {0: b"a", 1: b"b"}, "a later request saw an earlier log"),
        ([op(ENTRY, 0, 1, b"a", 0), op(APPEND, 5, math.inf, b"a")], {0: b"a"}, "a later request saw an earlier log"),
        ([op(APPEND, 0, 1, b"a", 0), op(LENGTH, 2, 3, place=2)], None, "more entries than anybody"),
    ],
)  # fmt: skip
def test_what_no_log_answers_is_found(operations: list[Operation], content: dict[int, bytes] | None, said: str) -> None:
    problem = log_problem(operations, content)
    assert problem is not None and said in problem and "\n" not in problem


def test_an_append_without_an_answer_may_be_there_or_not() -> None:
    asked = op(APPEND, 0, math.inf, b"a")
    assert log_problem([asked], {}) is None
    assert log_problem([asked], {0: b"a"}) is None


@pytest.mark.parametrize(
    "operations",
    [
        [op(WRITE, 0, 1, b"a"), op(READ, 2, 3, b"")],
        [op(WRITE, 0, 1, b"a"), op(WRITE, 2, 3, b"b"), op(READ, 4, 5, b"a")],
        [op(READ, 0, 1, b"a"), op(WRITE, 2, 3, b"a")],
        [op(WRITE, 0, 9, b"a"), op(READ, 1, 2, b"a"), op(READ, 3, 4, b"")],
        [op(READ, 0, 1, b"of nowhere")],
    ],
)
def test_what_no_register_answers_is_found(operations: list[Operation]) -> None:
    problem = register_problem(operations)
    assert problem is not None and "no order of the requests" in problem


def test_a_write_without_an_answer_may_happen_late_once_or_never() -> None:
    write = op(WRITE, 0, math.inf, b"a")
    assert register_problem([write, op(READ, 1, 2, b""), op(READ, 3, 4, b"a")]) is None
    assert register_problem([write, op(READ, 1, 2, b"")]) is None
    assert register_problem([write, op(READ, 1, 2, b"a"), op(READ, 3, 4, b"")]) is not None


@settings(max_examples=100)
@given(st.integers(0, 1 << 32), st.randoms(use_true_random=False))
def test_a_change_of_a_single_answer_of_the_log_is_found(seed: int, rng: random.Random) -> None:
    """Of an acknowledged append, when all of the log is looked at in the end."""
    seen = history(seed, unanswered=0)
    appends = [at for at, one in enumerate(seen) if one.kind == APPEND]
    content = {seen[at].place or 0: seen[at].value for at in appends}
    if len(appends) < 2:
        return
    at, other = rng.sample(appends, 2)
    seen[at] = dataclasses.replace(seen[at], place=seen[other].place)
    assert log_problem(seen, content) is not None


def explained(operations: list[Operation], fits: Callable[[Sequence[Operation]], bool]) -> bool:
    """By trying all orders that time allows, with and without what was never answered."""
    sure = [one for one in operations if one.answered < math.inf]
    open_ones = [one for one in operations if one.answered == math.inf]
    for count in range(len(open_ones) + 1):
        for some in itertools.combinations(open_ones, count):
            for order in itertools.permutations([*sure, *some]):
                pairs = itertools.combinations(order, 2)
                if all(before.asked <= after.answered for before, after in pairs) and fits(order):
                    return True
    return False


def fits_log(order: Sequence[Operation], content: dict[int, bytes]) -> bool:
    log: list[bytes] = []
    for one in order:
        if one.kind == APPEND:
            if one.place not in (None, len(log)):
                return False
            log.append(one.value)
        elif one.kind == LENGTH:
            if one.place != len(log):
                return False
        elif one.place is None or log[one.place : one.place + 1] != [one.value]:
            return False
    return dict(enumerate(log)) == content


def fits_register(order: Sequence[Operation]) -> bool:
    value = b""
    for one in order:
        if one.kind == READ and one.value != value:
            return False
        value = one.value
    return True


def draw_times(data: st.DataObject, may_be_open: bool) -> tuple[float, float]:
    asked = data.draw(st.integers(0, 8))
    if may_be_open and data.draw(st.integers(0, 3)) == 0:
        return asked, math.inf
    return asked, asked + data.draw(st.integers(0, 5))


def draw_log(data: st.DataObject) -> tuple[list[Operation], list[bytes]]:
    """What a real one answers to up to five requests, and what is in it at last."""
    operations, log = [], list[bytes]()
    for number in range(data.draw(st.integers(1, 5))):
        kind = data.draw(st.sampled_from((APPEND, APPEND, ENTRY, LENGTH)))
        asked, answered = number - data.draw(st.integers(0, 2)), number + data.draw(st.integers(0, 2))
        value, place = b"", len(log)
        if kind == ENTRY:
            if not log:
                continue
            place = data.draw(st.integers(0, len(log) - 1))
            value = log[place]
        elif kind == APPEND:
            value = b"%d" % number
            fate = data.draw(st.sampled_from(("answered", "answered", "unheard", "never")))
            if fate != "never":
                log.append(value)
            if fate != "answered":
                operations.append(Operation(number, kind, asked, value=value))
                continue
        operations.append(Operation(number, kind, asked, answered, value, place))
    return operations, log


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_the_log_is_judged_as_by_trying_all_orders(data: st.DataObject) -> None:
    """One that is real, and one of which a single thing has been changed."""
    operations, log = draw_log(data)
    assert log_problem(operations, dict(enumerate(log))) is None
    change = data.draw(st.sampled_from(("place", "time", "drop", "again", "swap")))
    at = data.draw(st.integers(0, len(operations) - 1)) if operations else None
    if change == "place" and at is not None and operations[at].place is not None:
        operations[at] = dataclasses.replace(operations[at], place=data.draw(st.integers(0, 4)))
    elif change == "time" and at is not None:
        moved, one = data.draw(st.integers(-5, 5)), operations[at]
        operations[at] = dataclasses.replace(one, asked=one.asked + moved, answered=one.answered + moved)
    elif log:
        place = data.draw(st.integers(0, len(log) - 1))
        if change == "drop":
            del log[place]
        elif change == "again":
            log.insert(data.draw(st.integers(0, len(log))), log[place])
        else:
            log[place], log[-1] = log[-1], log[place]
    content = dict(enumerate(log))
    expected = explained(operations, lambda order: fits_log(order, content))
    assert (log_problem(operations, content) is None) == expected


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_register_is_judged_as_by_trying_all_orders(data: st.DataObject) -> None:
    operations = []
    for number in range(data.draw(st.integers(0, 5))):
        kind = data.draw(st.sampled_from((WRITE, READ)))
        values = (b"a", b"b") if kind == WRITE else (b"", b"a", b"b")
        operations.append(Operation(number, kind, *draw_times(data, kind == WRITE), data.draw(st.sampled_from(values))))
    assert (register_problem(operations) is None) == explained(operations, fits_register)
