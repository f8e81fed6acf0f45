"""What a test image prints, read line by line: ``PASS: name`` and its like, and the ``SUMMARY``.

The format is that of kvm-unit-tests' lib/report.c: each verdict a line of its own, prefixes of the name separated by
``": "``; the last line counts tests and what was not as it should be. Output is hostile: it may be anything.
"""

from __future__ import annotations

import re
from typing import NamedTuple

CASES_MAX = 10_000
LINE_MAX = 4096
_CASE = re.compile(r"(PASS|FAIL|SKIP|XPASS|XFAIL|KFAIL|KPASS): (.*)")
_SUMMARY = re.compile(r"(?:.*: )?SUMMARY: (\d{1,9}) tests?((?:, \d{1,9} [a-z ]{1,40})*)\s*")
_COUNT = re.compile(r", (\d{1,9}) ([a-z ]+)")

BAD = ("FAIL", "XPASS", "KPASS")
"""Verdicts that are news nobody wants. XFAIL and KFAIL fail as they are known to."""


class Case(NamedTuple):
    """One verdict."""

    verdict: str
    name: str

    @property
    def bad(self) -> bool:
        """Whether the image has failed because of it."""
        return self.verdict in BAD


class Summary(NamedTuple):
    """The SUMMARY line."""

    tests: int
    unexpected_failures: int = 0
    expected_failures: int = 0
    skipped: int = 0


class Report(NamedTuple):
    """All verdicts in their order (at most CASES_MAX, ``truncated`` says if there were more), and the last SUMMARY."""

    cases: tuple[Case, ...]
    summary: Summary | None
    truncated: bool = False

    @property
    def failed(self) -> bool:
        """Whether a line says that something is wrong."""
        return any(case.bad for case in self.cases) or bool(self.summary and self.summary.unexpected_failures)


def parse_report(output: bytes) -> Report:
    """Whatever of ``output`` are verdicts; other lines are the image's own affair."""
    cases: list[Case] = []
    summary: Summary | None = None
    truncated = False
    for raw in output.split(b"\n"):
        line = raw[:LINE_MAX].decode(errors="replace").strip()
        if match := _CASE.fullmatch(line):
            if len(cases) < CASES_MAX:
                cases.append(Case(match[1], match[2]))
            else:
                truncated = True
        elif match := _SUMMARY.fullmatch(line):
            counts = {name: int(number) for number, name in _COUNT.findall(match[2])}
            known = counts.get("expected failures", 0) + counts.get("known failures", 0)
            summary = Summary(int(match[1]), counts.get("unexpected failures", 0), known, counts.get("skipped", 0))
    return Report(tuple(cases), summary, truncated)
