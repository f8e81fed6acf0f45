from __future__ import annotations

import math

import pytest

from pyvmm.demo.history import APPEND, ENTRY, LENGTH, READ, WRITE, Operation
from pyvmm.demo.store import judge

LOG = {0: b"1.1", 1: b"2.1", 2: b"1.2"}
HISTORY = [
    Operation(1, APPEND, 0.0, 1.0, b"1.1", 0), Operation(2, APPEND, 0.5, 1.5, b"2.1", 1),
    Operation(1, APPEND, 2.0, 3.0, b"1.2", 2), Operation(2, LENGTH, 4.0, 5.0, b"", 3),
    Operation(1, ENTRY, 4.0, 5.0, b"2.1", 1),
    Operation(1, WRITE, 6.0, 7.0, b"1.9"), Operation(2, READ, 8.0, 9.0, b"1.9"),
]  # fmt: skip


def test_nothing_was_lost() -> None:
    verdict = judge(HISTORY, LOG, [], None)
    assert (verdict.ok, verdict.writes_lost, verdict.connections_lost) == (True, 0, 0)
    assert verdict.text == "linearizable: 7 requests, 3 appends, each there once"


@pytest.mark.parametrize(
    ("change", "log", "lost"),
    [
        ([], {0: b"1.1", 1: b"2.1"}, 1),  # an acknowledged append is gone
        ([], {0: b"2.1", 1: b"1.1", 2: b"1.2"}, 2),  # two have changed places
        ([], LOG | {3: b"1.2"}, 0),  # one is there twice
        ([Operation(2, LENGTH, 6.0, 7.0, b"", 2)], LOG, 0),  # the log was shorter again
        ([Operation(1, READ, 10.0, 11.0, b"")], LOG, 0),  # the register went back
    ],
)
def test_what_was_lost_is_found(change: list[Operation], log: dict[int, bytes], lost: int) -> None:
    verdict = judge([*HISTORY, *change], log, [], None)
    assert (verdict.ok, verdict.writes_lost) == (False, lost)
    assert verdict.problems == [verdict.text]


def test_an_append_without_an_answer_may_be_there_or_not() -> None:
    cut = Operation(3, APPEND, 6.0, math.inf, b"3.1")
    for log in (LOG, LOG | {3: b"3.1"}):
        assert judge([*HISTORY, cut], log, ["client 3: reset"], None).ok
    assert judge([*HISTORY, cut], LOG, ["client 3: reset"], None).connections_lost == 1


def test_a_history_of_nothing_proves_nothing() -> None:
    assert not judge([], {}, [], None).ok
    assert not judge(HISTORY, LOG, [], "the log cannot be read").ok
