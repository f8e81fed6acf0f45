"""A pytest fixture that runs guests; pytest loads this by itself wherever pyvmm is installed.

A test that boots an image, reads what it says, answers, and looks at how it ended::

    def test_my_kernel(vm):
        guest = vm("build/kernel.elf", memory="64M", append="test=1")
        guest.expect(r"ready in (\\d+) ms", timeout=30)
        guest.send("run all\\n")
        guest.expect(r"all passed")
        assert guest.exit_status == 1          # debug-exit with 0: (0 << 1) | 1

and one that runs a test image as ``pyvmm test`` does::

    def test_image(vm):
        report = vm("x86/apic.flat", devices=["testdev"]).report()
        assert not report.failed, report.cases

``vm`` may be called several times; every guest is ended when the test is. Options that have no keyword go as further
strings: ``vm("kernel.elf", "--net", "demo")``. Nothing is imported or started before a test asks for ``vm``; a project
with a fixture of that name keeps its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyvmm.testing.guest_process import GuestProcess


class VmFactory:
    """What the ``vm`` fixture is: call it to start a guest."""

    def __init__(self) -> None:
        self.guests: list[GuestProcess] = []

    def __call__(
        self,
        image: str | os.PathLike[str],
        *options: str,
        memory: str | None = None,
        smp: int | None = None,
        append: str | None = None,
        initrd: str | os.PathLike[str] | None = None,
        devices: Sequence[str] = (),
        timeout: float = 60.0,
    ) -> GuestProcess:
        """Start ``pyvmm run IMAGE`` with these options; ``timeout`` (seconds) ends the guest."""
        arguments = [os.fspath(image), "--no-reboot"]
        if memory is not None:
            arguments += ["--memory", memory]
        if smp is not None:
            arguments += ["--smp", str(smp)]
        if append is not None:
            arguments.append(f"--append={append}")
        if initrd is not None:
            arguments += ["--initrd", os.fspath(initrd)]
        for device in devices:
            arguments += ["--device", device]
        from pyvmm.testing.guest_process import GuestProcess

        guest = GuestProcess([*arguments, *options], timeout=timeout)
        self.guests.append(guest)
        return guest

    def close(self) -> None:
        """End every guest."""
        while self.guests:
            self.guests.pop().close()


@pytest.fixture
def vm() -> Iterator[VmFactory]:
    """Starts guests: ``vm(image, ...)`` gives one with ``expect``, ``send``, ``output`` and ``exit_status``."""
    factory = VmFactory()
    try:
        yield factory
    finally:
        factory.close()
