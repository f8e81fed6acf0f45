"""What is forbidden, tried in a real process that has entered the sandbox; and what must go on working there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

PRELUDE = """
import ctypes, fcntl, mmap, os, signal, socket, subprocess, sys, tempfile, threading
libc = ctypes.CDLL(None, use_errno=True)
start, done = threading.Event(), threading.Event()
def work():
    start.wait(30)
    in_thread()
    done.set()
def in_thread(): pass
thread = threading.Thread(target=work, daemon=True)
thread.start()
from pyvmm.host.sandbox import enter_sandbox
enter_sandbox(cards=CARDS)
print("confined", flush=True)
"""


def confined(code: str, *, cards: bool = False) -> subprocess.CompletedProcess[str]:
    """A process that enters the sandbox, with a thread that was there before, and runs ``code``."""
    program = PRELUDE.replace("CARDS", str(cards)) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


FORBIDDEN = {
    "execve": "os.execv('/bin/true', ['true'])",
    "execveat": "libc.syscall(322, -100, b'/bin/true', 0, 0, 0)",
    "fork": "libc.syscall(57)",
    "vfork": "libc.syscall(58)",
    "clone": "os.fork()",
    "ptrace": "libc.ptrace(0, 0, 0, 0)",
    "process_vm_readv": "libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0)",
    "kill": "os.kill(os.getppid(), 0)",
    "mount": "libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0)",
    "chroot": "os.chroot('/')",
    "setns": "libc.setns(0, 0)",
    "unshare": "libc.unshare(0x10000000)",
    "bpf": "libc.syscall(321, 0, 0, 0)",
    "io_uring_setup": "libc.syscall(425, 1, 0)",
    "userfaultfd": "libc.syscall(323, 0)",
    "init_module": "libc.syscall(175, 0, 0, 0)",
    "capset": "libc.syscall(126, 0, 0)",
    "setuid": "os.setuid(os.getuid())",
    "prctl": "libc.prctl(38, 1, 0, 0, 0)",
    "seccomp": "libc.syscall(317, 0, 0, 0)",
    "mprotect": "m = ctypes.c_char.from_buffer(mmap.mmap(-1, 4096));"
    " libc.mprotect(ctypes.c_void_p(ctypes.addressof(m)), ctypes.c_size_t(4096), 4)",
    "mmap": "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
    "socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "ioctl": "fcntl.ioctl(0, 0x5412, b'x')",
}
ELSE = {
    "netfilter": ("socket", "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)"),
    "vsock": ("socket", "socket.socket(socket.AF_VSOCK)"),
    "a mapping to write and execute": (
        "mmap",
        "f = tempfile.TemporaryFile(); f.truncate(4096);"
        " mmap.mmap(f.fileno(), 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)",
    ),
    "a process in a new namespace": ("clone", "libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)"),
    "a tap without cards": ("ioctl", "fcntl.ioctl(0, 0x400454CA, bytes(40))"),
    "another's limits": ("prlimit64", "libc.prlimit(os.getppid(), 7, 0, 0)"),
    "a request beyond 32 bits": ("ioctl", "libc.syscall(16, 0, ctypes.c_ulong(0xAE00_0000_5412), 0)"),
}
CASES = {name: (name, code) for name, code in FORBIDDEN.items()} | ELSE


@pytest.mark.parametrize("name", CASES)
def test_what_is_forbidden_ends_the_process_with_its_name(name: str) -> None:
    call, code = CASES[name]
    done = confined(code + "\nprint('went on')")
    assert done.stdout == "confined\n", done.stdout + done.stderr
    assert done.returncode == -signal.SIGSYS, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"pyvmm: the sandbox refused the system call {call}"), done.stderr


def test_a_thread_that_was_there_before_is_confined_too() -> None:
    done = confined("in_thread = lambda: os.execv('/bin/true', ['true'])\nstart.set(); done.wait(30)\nprint('went on')")
    assert (done.returncode, done.stdout) == (-signal.SIGSYS, "confined\n"), done.stderr
    assert "refused the system call execve (59)" in done.stderr


def test_32_bit_system_calls_are_no_way_round() -> None:
    """x32's numbers, which the kernel may not know at all: refused or unknown, never carried out."""
    done = confined("print(libc.syscall(0x40000000 + 39), ctypes.get_errno())")
    assert done.returncode == -signal.SIGSYS, done.stdout


def test_a_reader_of_stderr_that_has_stopped_saves_nobody() -> None:
    done = confined(
        "r, w = os.pipe(); os.set_blocking(w, False)\n"
        "try:\n    while True: os.write(w, bytes(4096))\nexcept BlockingIOError: pass\n"
        "os.set_blocking(w, True); os.dup2(w, 2); os.execv('/bin/true', ['true'])"
    )
    assert done.returncode == -signal.SIGSYS


def test_with_signals_blocked_the_end_is_the_same_without_words() -> None:
    """As in subprocess, which blocks them round its vfork: the kernel then forces the default action."""
    done = confined("subprocess.run(['/bin/true'])\nprint('went on')")
    assert (done.returncode, done.stdout) == (-signal.SIGSYS, "confined\n"), done.stderr


@pytest.mark.parametrize("cards", [False, True])
def test_capabilities_are_gone_from_all_threads_and_all_sets(cards: bool) -> None:
    done = confined(
        "for task in os.listdir('/proc/self/task'):\n"
        "    print(open(f'/proc/self/task/{task}/status').read())\n"
        "later = threading.Thread(target=lambda: print(open('/proc/thread-self/status').read()))\n"
        "later.start(); later.join()",
        cards=cards,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    kept = 1 << 12 if cards and os.geteuid() == 0 else 0
    for name in ("CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"):
        values = [int(line[1], 16) for line in lines if line and line[0] == name]
        assert len(values) == 3
        # Who has no CAP_SETPCAP cannot narrow the bounding set; without exec it gives nothing.
        if name != "CapBnd:" or os.geteuid() == 0:
            allowed = kept if name in ("CapPrm:", "CapEff:", "CapBnd:") else 0
            assert values == [allowed] * 3 or (cards and values == [0] * 3), name
    assert [line[1] for line in lines if line and line[0] == "NoNewPrivs:"] == ["1"] * 3
    assert [line[1] for line in lines if line and line[0] == "Seccomp:"] == ["2"] * 3


def test_what_a_machine_does_late_still_works() -> None:
    done = confined(
        "import decimal, sqlite3, ssl, lz4.block, zstandard, iced_x86, rich.console, psutil, pyroute2\n"
        "psutil.Process().cpu_times(); socket.getaddrinfo('localhost', 80); socket.socketpair()\n"
        "with tempfile.TemporaryDirectory() as d:\n"
        "    open(d + '/x', 'w').close(); os.rename(d + '/x', d + '/y')\n"
        "    with socket.socket(socket.AF_UNIX) as s: s.bind(d + '/s'); s.listen()\n"
        "t = threading.Thread(target=print, args=('a thread',)); t.start(); t.join()\n"
        "signal.raise_signal(signal.SIGCONT); start.set(); print(done.wait(30))"
    )
    assert (done.returncode, done.stdout) == (0, "confined\na thread\nTrue\n"), done.stderr
