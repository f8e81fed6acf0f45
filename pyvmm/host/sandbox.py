"""What a process gives up once it is set up: capabilities, new privileges, and every system call it has no use for.

A hostile guest that takes over the VMM finds a process that cannot start a program, trace another, enter a namespace,
mount, open a packet or netlink socket, or map memory it can both write and execute. Whatever is not in the list of
:mod:`pyvmm.host.sandbox_rules` ends the process by SIGSYS after one line on stderr that names the call (without the
line if the thread blocks SIGSYS, as subprocess does round its vfork). A terminal in raw mode is left so.

What it does not do: files are opened by the rights of the user (a filter cannot see a path), and a guest that has
taken over can still use what is open.

Sources: seccomp(2), capabilities(7); libseccomp by its Python binding, pyseccomp.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from pyvmm.errors import HostError
from pyvmm.host.sandbox_rules import ABSENT, allowed_calls, allowed_with
from pyvmm.native import ffi, lib

CAP_NET_ADMIN = 12
_NAMED = 512  # x86-64 numbers its calls below this

_names: Any = None  # the native handler reads them as long as the process lives


def enter_sandbox(*, cards: bool) -> None:
    """For all threads, those to come too, and for good.

    ``cards``: network cards on taps, which need CAP_NET_ADMIN until they are closed; nothing else is kept.
    HostError: the kernel or libseccomp refuses, or a thread does not answer; the process is then not confined.
    """
    seccomp = _binding()
    filter_ = _filter(seccomp, cards=cards)
    _watch(seccomp)
    result = lib.pv_drop_capabilities(1 << CAP_NET_ADMIN if cards else 0)
    if result < 0:
        raise HostError(f"--sandbox: cannot drop capabilities: {os.strerror(-result)}; --sandbox off runs without")
    try:
        filter_.load()
    except OSError as error:
        refused = f"--sandbox: the kernel refuses the filter: {error.strerror}; --sandbox off runs without"
        raise HostError(refused) from None


def _binding() -> Any:
    try:
        import pyseccomp
    except (ImportError, RuntimeError) as error:  # RuntimeError: no libseccomp.so.2
        raise HostError(
            f"--sandbox: {error}; install libseccomp2 (Debian) and pyseccomp (PyPI), or use --sandbox off"
        ) from None
    return pyseccomp


def _filter(seccomp: Any, *, cards: bool) -> Any:
    """The list as a filter for all threads: not loaded yet."""
    filter_ = seccomp.SyscallFilter(seccomp.TRAP)
    filter_.set_attr(seccomp.Attr.CTL_TSYNC, 1)
    filter_.set_attr(seccomp.Attr.CTL_NNP, 1)
    filter_.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)  # int 0x80 and x32 have other numbers
    for call in ("ioctl", "futex", "read", "write", "epoll_wait"):  # the frequent ones are looked at first
        filter_.syscall_priority(call, 255)
    for call in allowed_calls():
        filter_.add_rule(seccomp.ALLOW, call)
    for rule in allowed_with(cards=cards):
        arguments = [seccomp.Arg(a.number, seccomp.MASKED_EQ, a.mask, a.value) for a in rule.arguments]
        filter_.add_rule_exactly(seccomp.ALLOW, rule.call, *arguments)
    for call in ABSENT:
        filter_.add_rule(seccomp.ERRNO(errno.ENOSYS), call)
    return filter_


def _watch(seccomp: Any) -> None:
    """Names for the line on stderr: made now, because a signal handler may not look for them."""
    global _names
    width = lib.PV_SYSCALL_NAME
    names = ffi.new("char[]", width * _NAMED)
    for number in range(_NAMED):
        try:
            name = seccomp.resolve_syscall(seccomp.Arch.X86_64, number)
        except ValueError:  # no such call
            continue
        ffi.memmove(names + width * number, name[: width - 1], min(len(name), width - 1))
    result = lib.pv_sandbox_watch(names, _NAMED)
    if result < 0:
        raise HostError(f"--sandbox: cannot take SIGSYS: {os.strerror(-result)}")
    _names = names
