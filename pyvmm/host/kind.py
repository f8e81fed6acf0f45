"""Which kind of KVM this is: hardware virtualization of Intel or AMD, or PVM, which needs neither."""

from __future__ import annotations

import os
from typing import NamedTuple

VENDOR_MODULES = {"kvm_intel": "vmx", "kvm_amd": "svm", "kvm_pvm": "pvm"}
"""Only one of them can have registered with KVM, and one that could not is not loaded."""


class HostKind(NamedTuple):
    """``vmx``, ``svm``, ``pvm`` or ``unknown``; whether the host is itself a VM; and how that was told."""

    kind: str
    nested: bool
    evidence: tuple[str, ...]


def tell_kind(flags: frozenset[str], modules: frozenset[str]) -> HostKind:
    """From /proc/cpuinfo's flags and the vendor modules under /sys/module."""
    evidence = [f"/sys/module/{name} is there" for name in sorted(modules)]
    hardware = sorted({"vmx", "svm"} & flags)
    evidence.append(f"/proc/cpuinfo has {' and '.join(hardware) if hardware else 'neither vmx nor svm'}")
    nested = "hypervisor" in flags
    if nested:
        evidence.append("/proc/cpuinfo has hypervisor: this host is itself a VM")
    kinds = {VENDOR_MODULES[name] for name in modules} or set(hardware)  # KVM may be built in without a module's entry
    return HostKind(kinds.pop() if len(kinds) == 1 else "unknown", nested, tuple(evidence))


def read_kind() -> HostKind:
    """Look at this host."""
    return tell_kind(
        frozenset(cpuinfo("flags").split()),
        frozenset(name for name in VENDOR_MODULES if os.path.isdir(f"/sys/module/{name}")),
    )


_PAGING = {"vmx": "kvm_intel/parameters/ept", "svm": "kvm_amd/parameters/npt"}


def read_two_dimensional_paging(kind: str, modules: str = "/sys/module") -> bool | None:
    """Whether the CPU walks KVM's page tables below the guest's (EPT, NPT); else KVM shadows the guest's own.

    ``None``: the vendor module does not say. It is fixed when the module is loaded.
    """
    if kind == "pvm":
        return False  # there is no such hardware that it could use
    try:
        with open(os.path.join(modules, _PAGING[kind]), encoding="ascii", errors="replace") as file:
            return {"Y": True, "1": True, "N": False, "0": False}.get(file.read(16).strip())
    except (KeyError, OSError):
        return None


def cpuinfo(field: str) -> str:
    """The first CPU's ``field`` in /proc/cpuinfo; empty if there is none."""
    import re

    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        found = re.search(rf"^{re.escape(field)}\s*: (.*)$", file.read(65536), re.MULTILINE)
    return found[1] if found else ""
