"""Saved state: one way for all devices, hostile data refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from pyvmm.devices.acpi_pm import AcpiPm
from pyvmm.devices.bus import PORT_SPACE, Bus
from pyvmm.devices.i8042 import I8042
from pyvmm.devices.serial import Serial
from pyvmm.devices.task_port import TASK_MAX
from pyvmm.errors import SectionError
from tests.unit.devices.fakes import MAKERS, AnyDevice, FakeLine, nothing

SECTIONS = sorted(MAKERS)
_LONG = b"x" * (TASK_MAX + 1)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_section_is_named_after_the_device(section: str) -> None:
    device = MAKERS[section][0]()
    assert device.section_id == section
    assert device.version == 1


class Poked(RuleBasedStateMachine):
    """A guest and a host that do anything; after each step the state moves to a new device unchanged."""

    section = ""
    device: AnyDevice
    ports = 0

    @initialize()
    def build(self) -> None:
        make, self.ports = MAKERS[self.section]
        self.device = make()

    @rule(offset=st.integers(0, 8), value=st.integers(0, 0xFF))
    def write(self, offset: int, value: int) -> None:
        self.device.write(offset % self.ports, 1, value)

    @rule(offset=st.integers(0, 8))
    def read(self, offset: int) -> None:
        assert 0 <= self.device.read(offset % self.ports, 1) <= 0xFF

    @rule(data=st.binary(max_size=20))
    def host_sends(self, data: bytes) -> None:
        if isinstance(self.device, Serial):
            assert 0 <= self.device.receive(data) <= len(data)

    @rule()
    def host_presses_power(self) -> None:
        if isinstance(self.device, AcpiPm):
            self.device.press_power_button()

    @rule()
    def reset(self) -> None:
        self.device.reset()

    @invariant()
    def the_state_moves(self) -> None:
        make, ports = MAKERS[self.section]
        saved = self.device.save()
        copy = make()
        copy.load(saved)
        assert copy.save() == saved
        assert self.device.save() == saved, "save must not change anything"
        # Not only equal on paper: the copy answers like the original, which then goes on from what it saved.
        original = make()
        original.load(saved)
        for offset in range(ports):
            assert copy.read(offset, 1) == original.read(offset, 1)
        assert copy.save() == original.save()


@pytest.mark.parametrize("section", SECTIONS)
def test_every_reachable_state_is_saved_and_loaded_unchanged(section: str) -> None:
    machine = type("PokedDevice", (Poked,), {"section": section})
    # No function-scoped fixtures here; the registers are few, so 25 walks of 30 steps reach deep.
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.parametrize("section", SECTIONS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bad_state_names_section_and_field_and_changes_nothing(section: str, data: st.DataObject) -> None:
    make, ports = MAKERS[section]
    device = make()
    for offset, value in data.draw(st.lists(st.tuples(st.integers(0, ports - 1), st.integers(0, 255)), max_size=4)):
        device.write(offset, 1, value)
    before = device.save()
    bad: dict[Any, Any] = dict(before)
    kind = data.draw(st.sampled_from(["unknown", "missing", "ill-typed"] if before else ["unknown"]))
    if kind == "unknown":
        field = data.draw(st.text(min_size=1, max_size=8).filter(lambda name: name not in before))
        bad[field] = 0
    else:
        field = data.draw(st.sampled_from(sorted(before)))
        if kind == "missing":
            del bad[field]
        else:
            bad[field] = data.draw(
                # Bytes longer than any field takes; a task is as long as a script.
                st.sampled_from([1.5, [], {}, "text", object(), -(10**30), 10**30, _LONG, "AAAA"])
            )
    with pytest.raises(SectionError) as error:
        device.load(bad)
    assert (error.value.section, error.value.field) == (section, field)
    assert device.save() == before


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("serial", "rx", b"two"),  # the FIFOs are off
        ("serial", "rx", "QQ=="),  # base64 is not how bytes are saved
        ("serial", "trigger", 5),
        ("serial", "ier", 0x10),
        ("serial", "ier", True),
        ("serial", "fifos", 1),
        ("acpi-pm", "status", 0x0002),
        ("acpi-pm", "control", 0x2000),
        ("rtc", "ram", bytes(127)),
        ("rtc", "index", 128),
        ("i8042", "output", 256),
    ],
)
def test_values_that_no_device_can_have_are_refused(section: str, field: str, value: object) -> None:
    device = MAKERS[section][0]()
    with pytest.raises(SectionError) as error:
        device.load(device.save() | {field: value})
    assert error.value.field == field


@pytest.mark.parametrize("data", [None, [], "serial", 3])
def test_state_that_is_no_mapping_is_refused(data: Any) -> None:
    with pytest.raises(SectionError, match="expected a mapping"):
        MAKERS["serial"][0]().load(data)


def test_a_saved_state_does_not_change_with_the_device() -> None:
    device = Serial(nothing)
    device.write(2, 1, 1)
    device.receive(b"ab")
    saved = device.save()
    device.read(0, 1)
    assert saved["rx"] == b"ab"


def _pressed(line: FakeLine) -> AnyDevice:
    device = AcpiPm(nothing, line)
    device.write(3, 1, 1)
    device.press_power_button()
    return device


def _received(line: FakeLine) -> AnyDevice:
    device = Serial(nothing, line)
    device.write(1, 1, 1)
    device.write(4, 1, 8)
    device.receive(b"x")
    return device


def _answered(line: FakeLine) -> AnyDevice:
    device = I8042(nothing, line)
    device.write(4, 1, 0xAA)
    return device


@pytest.mark.parametrize("interrupting", [_pressed, _received, _answered])
def test_load_drives_the_line_anew_even_if_the_level_is_the_same(
    interrupting: Callable[[FakeLine], AnyDevice],
) -> None:
    """The interrupt controller behind the line may be another one, or have been reset meanwhile."""
    line = FakeLine()
    device = interrupting(line)
    assert line.driven == [True]
    device.load(device.save())
    assert line.driven == [True, True]
    device.reset()
    assert line.driven[-1] is False


@settings(max_examples=60, deadline=None)
@given(
    pokes=st.lists(
        st.tuples(
            st.one_of(st.integers(0, PORT_SPACE - 1), st.sampled_from([0x60, 0x64, 0x70, 0x71, 0x3F8, 0x3FC, 0x604])),
            st.sampled_from([1, 2, 3, 4, 8]),
            st.integers(0, (1 << 64) - 1),
            st.booleans(),
        ),
        max_size=60,
    )
)
def test_a_guest_that_pokes_everything_cannot_raise(pokes: list[tuple[int, int, int, bool]]) -> None:
    bus = Bus("io", PORT_SPACE)
    bases = [0x600, 0xE9, 0xF4, 0x510, 0x60, 0x80, 0xCF9, 0x70, 0x3F8, 0x8900, 0x92, 0x580, 0x2000]
    devices = []
    for base, section in zip(bases, SECTIONS, strict=True):
        make, ports = MAKERS[section]
        devices.append(make())
        bus.claim(base, ports, devices[-1])
    for address, size, value, is_write in pokes:
        if is_write:
            bus.write(address, size, value & ((1 << 8 * size) - 1))
        else:
            assert 0 <= bus.read(address, size) < 1 << 8 * size
    # Every offset of every device, at the width it takes, whatever state the pokes left.
    for device, section in zip(devices, SECTIONS, strict=True):
        for offset in range(MAKERS[section][1]):
            for value in (0x00, 0xFF, 0x5A):
                device.write(offset, 1, value)
                assert 0 <= device.read(offset, 1) <= 0xFF
        device.load(device.save())
