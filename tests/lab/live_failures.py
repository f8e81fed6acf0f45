"""A pytest plugin for the lab: a failure's text at once, not at the end, which a hung run does not come to."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """After each phase of each test."""
    if report.failed:
        print(f"\n--- {report.nodeid} ({report.when}, {report.duration:.1f} s)\n{report.longreprtext}\n---", flush=True)
