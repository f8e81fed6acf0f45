"""ACPI fixed hardware: PM1a event block (power button), PM1a control block (sleep), the SCI.

Source: ACPI 6.5, section 4.8.3 "Fixed Hardware Registers": 4.8.3.1 PM1 event grouping (status, enable),
4.8.3.2 PM1 control grouping. Offsets: 0 PM1_STS, 2 PM1_EN, 4 PM1_CNT, two bytes each (FADT: PM1_EVT_LEN 4,
PM1_CNT_LEN 2); 6 GPE0_STS, 7 GPE0_EN, a byte each (4.8.4.1, GPE0_BLK_LEN 2). Byte accesses suffice for all of it:
the bits that act together share a byte.

There is no SMI_CMD (it must be 0 in the FADT), so the machine is always in ACPI mode and SCI_EN is wired to 1
(4.8.2.5).  No PM timer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from msgspec import Meta

from pyvmm.devices.device import IrqLine
from pyvmm.devices.irq import IrqOutput
from pyvmm.devices.state import DeviceState, StatefulDevice
from pyvmm.registers import Bit, Register, RegisterTable
from pyvmm.trace import trace_group

T = trace_group("devices")

S5_SLEEP_TYPE = 5
"""SLP_TYP that means soft off; the DSDT's ``_S5`` package holds the same value."""

PM1_STS, PM1_EN, PM1_CNT = 0, 2, 4
GPE0_STS, GPE0_EN = 6, 7
GPE_GENERATION = 1 << 0
"""The event of the VM generation counter."""

GLOBAL_LOCK = 1 << 5
POWER_BUTTON = 1 << 8
RTC_ALARM = 1 << 10
WAKE = 1 << 15

CNT_SCI_EN = 1 << 0
CNT_BM_RLD = 1 << 1
CNT_SLP_TYP_SHIFT = 10
CNT_SLP_TYP = 7 << CNT_SLP_TYP_SHIFT
CNT_SLP_EN = 1 << 13

_EVENTS = (Bit(GLOBAL_LOCK, "GBL"), Bit(POWER_BUTTON, "PWRBTN", "the power button"), Bit(RTC_ALARM, "RTC"))
TABLE = RegisterTable("ACPI power management", (
    Register(PM1_STS, "PM1_STS", "events, cleared by writing ones", size=2, bits=(*_EVENTS, Bit(WAKE, "WAK"))),
    Register(PM1_EN, "PM1_EN", "events that raise the SCI", size=2, bits=_EVENTS),
    Register(PM1_CNT, "PM1_CNT", "control", size=2, bits=(
        Bit(CNT_SCI_EN, "SCI_EN"), Bit(CNT_BM_RLD, "BM_RLD"), Bit(CNT_SLP_TYP, "SLP_TYP", "5: off"),
        Bit(CNT_SLP_EN, "SLP_EN", "sleep now"),
    )),
    Register(GPE0_STS, "GPE0_STS", "general events", bits=(Bit(GPE_GENERATION, "VMGENID"),)),
    Register(GPE0_EN, "GPE0_EN", "general events that raise the SCI", bits=(Bit(GPE_GENERATION, "VMGENID"),)),
))  # fmt: skip

_ENABLE_BITS = GLOBAL_LOCK | POWER_BUTTON | RTC_ALARM
_CONTROL_BITS = CNT_BM_RLD | CNT_SLP_TYP


class AcpiPmState(DeviceState):
    """The registers; ``control`` without SCI_EN (always 1) and SLP_EN (always reads 0)."""

    status: Annotated[int, Meta(ge=0, le=0xFFFF)] = 0
    enable: Annotated[int, Meta(ge=0, le=0xFFFF)] = 0
    control: Annotated[int, Meta(ge=0, le=0xFFFF)] = 0
    gpe_status: Annotated[int, Meta(ge=0, le=GPE_GENERATION)] = 0
    gpe_enable: Annotated[int, Meta(ge=0, le=GPE_GENERATION)] = 0

    def problem(self) -> tuple[str, str] | None:
        """Only bits that exist."""
        for field, mask in (
            ("status", POWER_BUTTON | WAKE),
            ("enable", _ENABLE_BITS),
            ("control", _CONTROL_BITS),
        ):
            value = getattr(self, field)
            if value & ~mask:
                return field, f"{value:#x} has bits outside {mask:#x}"
        return None


class AcpiPm(StatefulDevice[AcpiPmState]):
    """``sci`` is a level line; ``on_sleep(sleep_type)`` is called when the guest sets SLP_EN."""

    section_id = "acpi-pm"
    registers = TABLE

    def __init__(self, on_sleep: Callable[[int], None], sci: IrqLine | None = None) -> None:
        super().__init__(AcpiPmState)
        self._on_sleep = on_sleep
        self._sci = IrqOutput(sci)

    def press_power_button(self) -> None:
        """What the user's finger does: PWRBTN_STS, and an SCI if the guest enabled it."""
        with self.lock:
            self.state.status |= POWER_BUTTON
            self._update()
            T.acpi_pm_power_button.on and T.acpi_pm_power_button(self._sci.level)

    def raise_generation_event(self) -> None:
        """The VM generation counter has changed."""
        with self.lock:
            self.state.gpe_status |= GPE_GENERATION
            self._update()

    def read(self, offset: int, size: int) -> int:
        """One byte of a register."""
        s = self.state
        if offset < PM1_EN:
            value = s.status
        elif offset < PM1_CNT:
            value = s.enable
        elif offset < GPE0_STS:
            value = s.control | CNT_SCI_EN
        else:
            return s.gpe_status if offset == GPE0_STS else s.gpe_enable
        return value >> 8 * (offset & 1) & 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """One byte of a register; status bits are cleared by writing ones."""
        value &= 0xFF
        T.acpi_pm_write.on and T.acpi_pm_write(offset, value)
        s = self.state
        shift = 8 * (offset & 1)
        keep, bits = ~(0xFF << shift), value << shift
        if offset < PM1_EN:
            s.status &= ~bits
        elif offset < PM1_CNT:
            s.enable = s.enable & keep | bits & _ENABLE_BITS
        elif offset == GPE0_STS:
            s.gpe_status &= ~value
        elif offset == GPE0_EN:
            s.gpe_enable = value & GPE_GENERATION
        else:
            s.control = s.control & keep | bits & _CONTROL_BITS
            if bits & CNT_SLP_EN:
                self._sleep((s.control & CNT_SLP_TYP) >> CNT_SLP_TYP_SHIFT)
        self._update()

    def _sleep(self, sleep_type: int) -> None:
        T.acpi_pm_sleep.on and T.acpi_pm_sleep(sleep_type)
        # A sleep that the machine does not carry out must look like one that ended at once, or the guest waits
        # for WAK_STS for ever (4.8.3.1.1).
        self.state.status |= WAKE
        self._on_sleep(sleep_type)

    def _update(self) -> None:
        s = self.state
        self._sci.drive(bool(s.status & s.enable | s.gpe_status & s.gpe_enable))

    def state_replaced(self) -> None:
        """Drive the SCI anew."""
        self._update()
        self._sci.redrive(self._sci.level)
