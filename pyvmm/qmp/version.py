"""The version a monitor tells: pyvmm's own, in QEMU's structure."""

from __future__ import annotations

from pyvmm import __version__
from pyvmm.qmp.arguments import QmpStruct


class VersionTriple(QmpStruct):
    """Three numbers."""

    major: int
    minor: int
    micro: int


class VersionInfo(QmpStruct):
    """``qemu`` holds pyvmm's numbers: the member has that name in the protocol; ``package`` says whose they are."""

    qemu: VersionTriple
    package: str


def version_info() -> VersionInfo:
    """This pyvmm's."""
    major, minor, micro = (int(number) for number in __version__.split("."))
    return VersionInfo(qemu=VersionTriple(major=major, minor=minor, micro=micro), package=f"pyvmm-{__version__}")


def version_document() -> dict[str, object]:
    """The same, JSON-ready, for the greeting."""
    info = version_info()
    numbers = {"major": info.qemu.major, "minor": info.qemu.minor, "micro": info.qemu.micro}
    return {"qemu": numbers, "package": info.package}
