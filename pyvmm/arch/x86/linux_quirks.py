"""What pyvmm adds to Linux's command line, and why. Every addition is visible and can be removed (``-NAME``)."""

from __future__ import annotations

from dataclasses import dataclass

# Not among them: xsave and avx. User code on such a host sees what the hardware has, OSXSAVE included, whatever the
# guest's kernel thinks: glibc copies memory with AVX and AVX-512 there. A kernel told to leave XSAVE alone saves only
# XMM registers, and the upper halves of the vectors are lost at a task switch (strings with holes, crashes before
# main). So the kernel must save them, by XSAVE instructions that pyvmm carries out.
_MASKED = "popcnt,abm,cx16,rdrand,rdseed,fsgsbase,smap,smep,umip,pcid,invpcid,bmi1,bmi2,adx,rdpid,xsaves,erms,fsrm"


@dataclass(frozen=True)
class Addition:
    """One word of the command line; ``quirk``: only on hosts with it; ``cardless``: only without a network card."""

    text: str
    reason: str
    quirk: str | None = None
    cardless: bool = False


ADDITIONS = (
    Addition("console=ttyS0", "the only console there is"),
    Addition("8250.nr_uarts=1", "probing for three more UARTs costs exits"),
    Addition("reboot=k", "reset by the keyboard controller, the first thing pyvmm's machine answers"),
    Addition("panic=-1", "a kernel that panics resets at once instead of hanging"),
    Addition("quiet", "kernel messages cost an exit a character and get between commands' output"),
    Addition("clocksource=kvm-clock", "the TSC cannot be moved with the guest there", "emulated-cpl0"),
    Addition(f"clearcpuid={_MASKED}",
             "instructions KVM's emulator does not know, or (erms, fsrm) runs a byte at a time; the kernel must be"
             " told, since CPUID shows the hardware's features through", "emulated-cpl0"),
    # What these save, in millions of emulated instructions up to /init (tiny kernel, 128 MiB, one vCPU; 15 with all).
    Addition("initcall_blacklist=slab_late_init,param_sysfs_builtin_init,irq_sysfs_init,cacheinfo_sysfs_init,"
             "perf_event_sysfs_init,clockevents_init_sysfs",
             "saves 4.4: making thousands of files in /sys/kernel/slab and /sys/module/*/parameters, and those about"
             " interrupts, caches, perf and clock events (then missing)", "emulated-cpl0"),
    Addition("noreplace-smp",
             "saves 2.8: five thousand LOCK prefixes, each patched away through a mapping of its own", "emulated-cpl0"),
    Addition("rodata=off", "saves 0.6: splitting and flushing the kernel's mapping to write-protect it",
             "emulated-cpl0"),
    Addition("percpu_alloc=page", "saves 0.3: clearing a 2 MiB page to use a twelfth of it", "emulated-cpl0"),
    Addition("ipv6.disable=1", "saves 0.5: IPv6's tables and files, for which there is no card", "emulated-cpl0",
             cardless=True),
)  # fmt: skip


def linux_additions(quirks: frozenset[str], without: list[str], *, base: bool, cards: bool) -> list[str]:
    """The words to add on a host with ``quirks``, with ``base`` also those for every host.

    ``without`` lists prefixes of words to leave out; ``cards``: the machine has a network card.
    """
    return [
        a.text
        for a in ADDITIONS
        if (base if a.quirk is None else a.quirk in quirks)
        and not (a.cardless and cards)
        and not any(a.text.startswith(name) for name in without if name)
    ]


def split_removals(words: list[str], further: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """(words to add, prefixes to leave out): ``-NAME`` removes pyvmm's addition that starts with NAME.

    ``further``: beginnings of additions that are not in ADDITIONS, for example ``ip=``. Other words that start with
    ``-`` are the guest's own, and so is everything behind a ``--``.
    """
    end = words.index("--") if "--" in words else len(words)
    texts = (*(a.text for a in ADDITIONS), *further)
    removals = [w for w in words[:end] if len(w) > 1 and w[0] == "-" and any(t.startswith(w[1:]) for t in texts)]
    kept = [w for w in words[:end] if w not in removals] + words[end:]
    return kept, [w[1:] for w in removals]
