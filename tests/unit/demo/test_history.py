"""The history checker: it believes what a real store answered, and finds what is wrong."""

from __future__ import annotations

import dataclasses
import math
import random

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
