"""Only legal transitions happen, whatever is asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import StateError
from pyvmm.machine.run_state import RunState, RunStateTracker

ENDED = {RunState.SHUTDOWN, RunState.GUEST_PANICKED, RunState.INTERNAL_ERROR}


def test_a_life() -> None:
    tracker = RunStateTracker()
    for state in (RunState.RUNNING, RunState.PAUSED, RunState.RUNNING, RunState.SHUTDOWN, RunState.PRELAUNCH):
        tracker.change(state)
    assert tracker.state is RunState.PRELAUNCH


@given(st.lists(st.sampled_from(RunState), max_size=30))
def test_a_refused_change_changes_nothing_and_the_ended_do_not_run(asked: list[RunState]) -> None:
    tracker = RunStateTracker()
    for new in asked:
        old = tracker.state
        try:
            assert tracker.change(new) is old
        except StateError:
            assert tracker.state is old
        else:
            assert tracker.state is new
            assert not (old in ENDED and new is not RunState.PRELAUNCH)


def test_the_error_names_both_states() -> None:
    tracker = RunStateTracker()
    tracker.change(RunState.SHUTDOWN)
    with pytest.raises(StateError, match="shutdown cannot become running"):
        tracker.change(RunState.RUNNING)
