"""Why a vCPU came back, as plain records. Source: Documentation/virt/kvm/api.rst, "The kvm_run structure"."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


class PortWrite(msgspec.Struct, frozen=True):
    """``out``: ``data`` to ``port``, an item of ``size`` bytes after the other (one, but for ``rep outs``)."""

    port: Annotated[int, Meta(ge=0, le=0xFFFF)]
    size: int
    data: bytes

    @property
    def value(self) -> int:
        """The first item."""
        return int.from_bytes(self.data[: self.size], "little")


class PortRead(msgspec.Struct):
    """``in``: set :attr:`data` (``count`` items of ``size`` bytes; all ones at first) before the next step."""

    port: int
    size: int
    count: int
    data: bytes

    def answer(self, value: int) -> None:
        """Every item is ``value``. ValueError if it does not fit."""
        try:
            self.data = value.to_bytes(self.size, "little") * self.count
        except OverflowError:
            raise ValueError(f"{value:#x} does not fit into the {self.size} bytes of port {self.port:#x}") from None


class MmioWrite(msgspec.Struct, frozen=True):
    """A write to guest-physical ``address`` where there is no memory."""

    address: int
    data: bytes

    @property
    def value(self) -> int:
        """Little-endian."""
        return int.from_bytes(self.data, "little")


class MmioRead(msgspec.Struct):
    """A read where there is no memory: set :attr:`data` (``size`` bytes; all ones at first) before the next step."""

    address: int
    size: int
    data: bytes

    def answer(self, value: int) -> None:
        """ValueError if it does not fit."""
        try:
            self.data = value.to_bytes(self.size, "little")
        except OverflowError:
            raise ValueError(f"{value:#x} does not fit into the {self.size} bytes read at {self.address:#x}") from None


class Halt(msgspec.Struct, frozen=True):
    """``hlt``: nothing wakes this vCPU but the next step."""


class Step(msgspec.Struct, frozen=True):
    """One instruction was carried out (``steps(single=True)``); ``rip`` is the next one's."""

    rip: int


class Shutdown(msgspec.Struct, frozen=True):
    """A triple fault: the machine is over."""


class EmulationFailure(msgspec.Struct, frozen=True):
    """KVM has to emulate here and does not know the instruction that begins with ``code``; the machine is over."""

    code: bytes


Exit = PortWrite | PortRead | MmioWrite | MmioRead | Halt | Step | Shutdown | EmulationFailure
