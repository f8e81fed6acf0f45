"""What a machine that runs may ask of the kernel, and why: the allowlist that :mod:`pyvmm.host.sandbox` loads.

Found by running every kind of machine under strace and under the filter itself, which names what it refuses.
"""

from __future__ import annotations

import os
from typing import NamedTuple

FREE: dict[str, str] = {
    "data of descriptors that are open": "read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2"
    " lseek fsync fdatasync ftruncate fallocate sync_file_range close dup dup2 dup3 fcntl flock",
    "files by name: disks, snapshots, reports, traces, modules imported late": "openat open stat lstat fstat newfstatat"
    " statx access faccessat faccessat2 readlink readlinkat getdents64 getcwd chdir unlink unlinkat rename renameat"
    " renameat2 mkdir mkdirat rmdir umask chmod fchmod fchmodat fstatfs statfs utimensat",
    "waiting and waking": "poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 pipe2"
    " futex timerfd_create timerfd_settime timerfd_gettime nanosleep clock_nanosleep restart_syscall sched_yield",
    "connections": "bind listen accept accept4 connect shutdown getsockname getpeername getsockopt setsockopt sendto"
    " recvfrom sendmsg recvmsg sendmmsg recvmmsg",
    "memory that nothing is executed from": "munmap mremap brk madvise msync mlock munlock memfd_create",
    "signals, and the ends of threads and of the dashboard": "rt_sigaction rt_sigprocmask rt_sigreturn rt_sigtimedwait"
    " rt_sigpending sigaltstack exit exit_group set_robust_list get_robust_list rseq set_tid_address wait4",
    "who and when": "getpid gettid getppid getuid geteuid getgid getegid clock_gettime clock_getres gettimeofday time"
    " times uname sysinfo getrusage getrandom getcpu sched_getaffinity sched_getscheduler sched_getparam"
    " sched_getattr capget getgroups getpgrp",
}
"""Calls whose arguments do not matter here, by purpose."""


class Argument(NamedTuple):
    """``argument & mask == value``, the ``number``-th one, from 0."""

    number: int
    value: int
    mask: int = (1 << 64) - 1


class Rule(NamedTuple):
    """A call that is allowed with these arguments only."""

    call: str
    arguments: tuple[Argument, ...]


_INT = 0xFFFFFFFF  # where the kernel takes an int, it looks at no more of the register
_PROT_WRITE, _PROT_EXEC, _MAP_ANONYMOUS = 0x2, 0x4, 0x20
# CLONE_THREAD, and none of the CLONE_NEW* flags, CLONE_PTRACE or CLONE_VFORK.
_CLONE_THREAD = 0x00010000
_CLONE_NEVER = 0x7E020080 | 0x2000 | 0x4000
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _NETLINK_ROUTE = 1, 2, 10, 16, 0
_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA = 15, 16, 0x53564D41
_KVMIO = 0xAE
# Sizes and discards of disks; of terminals only what reads or restores their mode (TIOCSTI would type commands).
_IOCTLS = {
    "BLKROGET": 0x125E, "BLKSSZGET": 0x1268, "BLKPBSZGET": 0x127B, "BLKGETSIZE64": 0x80081272, "BLKDISCARD": 0x1277,
    "BLKZEROOUT": 0x127F, "BLKIOMIN": 0x1278,
    "TCGETS": 0x5401, "TCSETS": 0x5402, "TCSETSW": 0x5403, "TCSETSF": 0x5404, "TIOCGWINSZ": 0x5413,
    "TIOCGPGRP": 0x540F, "TIOCOUTQ": 0x5411, "FIONREAD": 0x541B, "FIONBIO": 0x5421, "FIONCLEX": 0x5450,
    "FIOCLEX": 0x5451,
}  # fmt: skip
# A tap's flags, MTU, address; its offloads and headers, which a reset or a guest that comes sets again.
_CARD_IOCTLS = {
    "SIOCGIFFLAGS": 0x8913, "SIOCSIFFLAGS": 0x8914, "SIOCGIFMTU": 0x8921, "SIOCSIFMTU": 0x8922, "SIOCGIFHWADDR": 0x8927,
    "TUNSETIFF": 0x400454CA, "TUNGETIFF": 0x800454D2, "TUNSETOFFLOAD": 0x400454D0, "TUNSETVNETHDRSZ": 0x400454D8,
    "TUNSETVNETLE": 0x400454DC, "TUNSETQUEUE": 0x400454D9, "TUNGETFEATURES": 0x800454CF, "TUNSETCARRIER": 0x400454E2,
}  # fmt: skip


def allowed_calls() -> list[str]:
    """Those allowed whatever their arguments."""
    return sorted({call for calls in FREE.values() for call in calls.split()})


def allowed_with(*, cards: bool) -> list[Rule]:
    """Those allowed with certain arguments; ``cards``: the machine has network cards on taps."""
    me = os.getpid()
    rules = [
        # Code comes from files only (a module imported late, a library), and never where it can be written.
        Rule("mmap", (Argument(2, 0, _PROT_EXEC),)),
        Rule("mmap", (Argument(2, _PROT_EXEC, _PROT_EXEC | _PROT_WRITE), Argument(3, 0, _MAP_ANONYMOUS))),
        Rule("mprotect", (Argument(2, 0, _PROT_EXEC),)),
        Rule("clone", (Argument(0, _CLONE_THREAD, _CLONE_THREAD | _CLONE_NEVER),)),
        Rule("tgkill", (Argument(0, me, _INT),)),  # kicks of vCPUs
        Rule("kill", (Argument(0, me, _INT),)),
        Rule("prlimit64", (Argument(0, 0, _INT), Argument(2, 0))),  # reading one's own limits
        Rule("sched_setattr", (Argument(0, 0, _INT),)),
        Rule("socket", (Argument(0, _AF_NETLINK, _INT), Argument(2, _NETLINK_ROUTE, _INT))),  # getaddrinfo, leases
        Rule("socketpair", (Argument(0, _AF_UNIX, _INT),)),
        Rule("ioctl", (Argument(1, _KVMIO << 8, 0xFF00),)),
    ]
    rules += [Rule("socket", (Argument(0, family, _INT),)) for family in (_AF_UNIX, _AF_INET, _AF_INET6)]
    rules += [Rule("prctl", (Argument(0, option, _INT),)) for option in (_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA)]
    requests = _IOCTLS | (_CARD_IOCTLS if cards else {})
    rules += [Rule("ioctl", (Argument(1, request, _INT),)) for request in requests.values()]
    return rules


ABSENT = ("clone3",)
"""Answered by ENOSYS: its flags are in memory, where a filter cannot look; the C library then uses clone."""
