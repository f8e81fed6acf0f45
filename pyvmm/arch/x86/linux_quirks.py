"""What pyvmm adds to Linux's command line, and why. Every addition is visible and can be removed (``-NAME``)."""

from __future__ import annotations

from dataclasses import dataclass

_MASKED = (
    "popcnt,abm,cx16,rdrand,rdseed,fsgsbase,smap,smep,umip,pcid,invpcid,bmi1,bmi2,adx,rdpid,xsaves,avx,erms,fsrm"
)


@dataclass(frozen=True)
class Addition:
    """One word of the command line; ``quirk``: only on hosts that have it."""

    text: str
    reason: str
    quirk: str | None = None


ADDITIONS = (
    Addition("console=ttyS0", "the only console there is"),
    Addition("8250.nr_uarts=1", "probing for three more UARTs costs exits"),
    Addition("reboot=k", "reset by the keyboard controller, the first thing pyvmm's machine answers"),
    Addition("panic=-1", "a kernel that panics resets at once instead of hanging"),
    Addition("quiet", "kernel messages cost an exit a character and get between commands' output"),
    Addition("clocksource=kvm-clock", "the TSC cannot be moved with the guest there", "emulated-cpl0"),
    Addition("noxsave", "xsave and xrstor are not known to KVM's emulator", "emulated-cpl0"),
    Addition(f"clearcpuid={_MASKED}",
             "instructions KVM's emulator does not know, or (erms, fsrm) runs a byte at a time; the kernel must be"
             " told, since CPUID shows the hardware's features through", "emulated-cpl0"),
    Addition("lpj=20000", "calibrating the delay loop takes emulated seconds", "emulated-cpl0"),
)  # fmt: skip


def linux_additions(quirks: frozenset[str], without: list[str], *, base: bool) -> list[str]:
    """The words to add on a host with ``quirks``, with ``base`` also those for every host.

    ``without`` lists prefixes of words to leave out.
    """
    return [
        a.text
        for a in ADDITIONS
        if (base if a.quirk is None else a.quirk in quirks)
        and not any(a.text.startswith(name) for name in without if name)
    ]


def split_removals(words: list[str]) -> tuple[list[str], list[str]]:
    """(words to add, prefixes to leave out): ``-NAME`` removes pyvmm's addition that starts with NAME."""
    return [w for w in words if not w.startswith("-")], [w[1:] for w in words if w.startswith("-")]
