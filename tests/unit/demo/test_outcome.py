from __future__ import annotations

import pytest

from pyvmm.demo.outcome import DemoOptions, Failure, Outcome
from pyvmm.demo.workload import Exchange, Verdict


def outcome() -> Outcome:
    """Two failures, at 10 and 20, each over after 1 second and protected again after 3."""
    made = Outcome(DemoOptions(kill=("primary", "link"), kills=2), "a guest", 0.0)
    made.failures = [
        Failure("primary", 10.0, "alice", "bob", 11.0, 5.0, 13.0, [0.5]),
        Failure("link", 20.0, "bob", "carol", 21.0, 7.0, 23.0, [0.7]),
    ]
    made.verdict = Verdict(ok=True, text="linearizable", writes_lost=0)
    return made


@pytest.mark.parametrize(
    ("began", "ended", "protected"),
    [
        (1, 9, True), (9, 10.5, None), (10.5, 12, None), (11.5, 12.5, False), (12, 14, None), (13.5, 19, True),
        (14, 22, None), (21.5, 22, False), (24, 25, True),
    ],
)  # fmt: skip
def test_a_request_was_protected_if_it_was_so_all_the_time(began: float, ended: float, protected: bool | None) -> None:
    assert outcome().is_protected(Exchange(1, 1, began, ended)) is protected


def test_all_is_well_only_if_nothing_was_lost_and_the_last_failure_was_made_good() -> None:
    assert outcome().ok
    wrong_ones = [
        Verdict(ok=False, text=""), Verdict(ok=True, text="", writes_lost=1),
        Verdict(ok=True, text="", connections_lost=1),
    ]  # fmt: skip
    for wrong in wrong_ones:
        made = outcome()
        made.verdict = wrong
        assert not made.ok
    made = outcome()
    made.failures[1].protected = None
    assert not made.ok
    made = outcome()
    del made.failures[1]
    assert not made.ok


def test_the_table() -> None:
    rows = dict(outcome().rows())
    assert rows["failures"] == "1 x SIGKILL for the primary, 1 x replication link silent"
    assert rows["gap that clients saw"] == "median 600 ms, largest 700 ms"
    assert rows["protected again after"] == "median 3.0 s, largest 3.0 s"
    assert rows["acknowledged writes lost"] == "0"
