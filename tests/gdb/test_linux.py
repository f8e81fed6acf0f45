"""Debian's gdb on an unmodified Linux from its first instruction on, where CPL 0 may be emulated."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.machine.tiny_linux import find_kernel
from tests.framework.debugging import debugged
from tests.gdb.test_bare_metal import in_order


@pytest.mark.linux
@pytest.mark.timeout(300)
def test_start_kernel_a_driver_and_the_log(tmp_path: Path) -> None:
    with debugged(tmp_path, "linux", "-S", "--serial", "null") as guest:
        text = guest.gdb(
            Path(find_kernel(None)),
            "break start_kernel", "continue", "backtrace", "delete",
            "break univ8250_console_init", "continue", "backtrace", "p (int)($cr0 >> 31 & 1)", "stepi",
            "x/s (char *)&__log_buf + 8", "x/s (char *)&linux_banner",
            "monitor info mem", "monitor info lapic", "info threads", "kill",
        )  # fmt: skip
        in_order(
            text,
            "Breakpoint 1, 0xffffffff", "in start_kernel ()", "in start_kernel ()", "in x86_64_start_kernel ()",
            "Breakpoint 2, 0xffffffff", "in univ8250_console_init ()", "in console_init ()",
            "in univ8250_console_init ()", "Linux version 6.", "Linux version 6.", " -rw", "LVTT", "vCPU 0, CPL 0",
            "killed",
        )  # fmt: skip
        assert guest.running.finish()[0] == 0
