"""What came of one image: from its output, its status and how the machine ended, to one verdict.

The exit status of the image is what it wrote to debug-exit (QEMU and pyvmm end with ``(status << 1) | 1``, which no
clean end has): 0 success, 77 skipped, 124 it timed out by itself, 127 and above it aborted, all else failed.
"""

from __future__ import annotations

from typing import NamedTuple

from pyvmm.testing.report import Report, parse_report

STATUS_SKIPPED = 77
STATUS_TIMEOUT = 124
STATUS_ABORTED = 127
NAMES = {"pass": "PASS", "fail": "FAIL", "skip": "SKIP", "timeout": "FAIL (timeout)", "refused": "FAIL (refused)"}


class Result(NamedTuple):
    """``outcome``: pass, fail, skip, timeout, or refused (pyvmm would not run it). ``seconds`` of wall time."""

    name: str
    outcome: str
    reason: str
    """Empty for a pass."""
    seconds: float = 0.0
    report: Report = Report((), None)
    output: bytes = b""
    notes: tuple[str, ...] = ()
    """What a person should know besides."""

    @property
    def failed(self) -> bool:
        """Whether it counts against the run."""
        return self.outcome not in ("pass", "skip")


def judge(name: str, kind: str, value: int | None, reason: str, output: bytes, seconds: float) -> Result:
    """The result of an image whose machine ended as ``kind`` with ``value`` in debug-exit (see machine.ending)."""
    report = parse_report(output)

    def result(outcome: str, why: str = "") -> Result:
        return Result(name, outcome, why, seconds, report, output)

    if kind == "timeout":
        return result("timeout", reason)
    if kind != "debug-exit" or value is None:
        # A clean end is not enough: an image that crashed halfway and halted ends cleanly, too.
        return result("fail", f"ended without an exit status: {reason or kind}")
    if value == 0:
        if report.failed:
            bad = sum(case.bad for case in report.cases)
            return result("fail", f"status 0, but its output has {bad} unexpected failures" if bad else
                          "status 0, but its SUMMARY has unexpected failures")  # fmt: skip
        return result("pass")
    if value == STATUS_SKIPPED:
        return result("fail", "skipped, but with unexpected failures") if report.failed else result("skip", "skipped")
    if value == STATUS_TIMEOUT:
        return result("timeout", "status 124: it timed out by itself")
    if value >= STATUS_ABORTED:
        return result("fail", f"aborted: status {value}")
    bad = sum(case.bad for case in report.cases)
    return result("fail", f"status {value}" + (f", {bad} unexpected failures" if bad else ""))
