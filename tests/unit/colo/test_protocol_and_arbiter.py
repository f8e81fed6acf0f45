"""The protocol and the arbiter together: whatever happens at whatever message, one side at most goes on, it is whole,
and nobody hears of what it does not know.
"""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pyvmm.colo.session import ColoSession
from pyvmm.machine.output_hold import OutputHold
from tests.framework.two_sides import World
from tests.lab.selection import long_form

EVENTS = ("kill primary", "kill secondary", "cut", "stall", "ask primary", "ask secondary", "away")
PLANS = st.dictionaries(st.integers(1, 40), st.sampled_from(EVENTS), max_size=3)


def judge(world: World, mode: str) -> None:
    register = world.run()
    sides = {"primary": world.primary, "secondary": world.secondary}
    outcomes = {name: side.outcome or "" for name, side in sides.items()}
    assert not any(text.startswith("internal") for text in outcomes.values()), outcomes
    owners = [name for name, text in outcomes.items() if text in ("owner", "never paired")]
    assert len(owners) <= 1, outcomes
    if not any(side.guest.dead for side in sides.values()):
        assert len(owners) == 1 or "before there was a whole checkpoint" in outcomes["secondary"], outcomes
    if owners and register is not None and register.state == "solo":
        assert register.owner == sides[owners[0]].session.owner
    for name, side in sides.items():
        if name not in owners:
            assert side.guest.dead or side.guest.lost or not side.guest.runs or side.guest.hold.mode != "pass", outcomes
    check_heard(world, mode, owners)


def check_heard(world: World, mode: str, owners: list[str]) -> None:
    ours = [number for name, number in world.heard if name == "primary"]
    theirs = [number for name, number in world.heard if name == "secondary"]
    assert ours == list(range(1, len(ours) + 1)), ours
    if theirs:
        assert owners == ["secondary"]
        assert theirs == list(range(theirs[0], theirs[0] + len(theirs)))
        if mode == "periodic":
            # Nothing that was heard is undone, and nobody speaks for a guest that is lost. (What the secondary holds a
            # checkpoint of may be let out late: it has agreed to that.)
            assert theirs[0] > len(ours), (len(ours), theirs[0])


SETTINGS = settings(
    max_examples=2000 if long_form() else 60, deadline=None, suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate],  # a race does not shrink
)  # fmt: skip


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["periodic", "hybrid"])
@SETTINGS
@given(plan=PLANS)
def test_one_side_goes_on_and_knows_all_that_was_heard(mode: str, plan: dict[int, str]) -> None:
    judge(World(mode, plan), mode)


@pytest.mark.parametrize("event", EVENTS)
def test_each_of_it_alone_at_each_message_of_a_checkpoint(event: str) -> None:
    for step in range(14, 30):  # the first checkpoint is over then
        judge(World("periodic", {step: event}), "periodic")


@pytest.mark.parametrize("told", ["primary", "secondary"])
@pytest.mark.parametrize("mode", ["periodic", "hybrid"])
def test_who_is_told_that_the_other_is_gone_goes_on(mode: str, told: str) -> None:
    """Also in the midst of a checkpoint: the other side, which lives, notices nothing before the arbiter was asked."""
    for step in range(14, 40):
        world = World(mode, {step: f"ask {told}"})
        judge(world, mode)
        side = {"primary": world.primary, "secondary": world.secondary}[told]
        assert side.outcome == "owner", (step, world.primary.outcome, world.secondary.outcome)
        assert side.session.last_reason == "request"


def test_output_that_is_let_out_too_early_is_found() -> None:
    """Or else the tests above would prove nothing."""

    def at_once(hold: OutputHold, data: bytes) -> None:
        if hold.mode != "discard":
            hold._out(data)

    with mock.patch.object(OutputHold, "put", at_once), pytest.raises(AssertionError):
        for step in range(14, 40):
            judge(World("periodic", {step: "kill primary"}), "periodic")


def test_a_side_that_does_not_ask_is_found() -> None:
    with mock.patch.object(ColoSession, "claim", lambda session: True), pytest.raises(AssertionError):
        for step in range(14, 40):
            judge(World("periodic", {step: "cut"}), "periodic")
