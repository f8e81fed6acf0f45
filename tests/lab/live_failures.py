"""A pytest plugin for the lab: a failure's text at once, not at the end, which a hung run does not come to."""

from __future__ import annotations

import pytest


class _Printer:
    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self.terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """After each phase of each test; by the terminal's own way, since standard output is captured."""
        if report.failed:
            self.terminal.ensure_newline()
            self.terminal.write_line(f"--- {report.nodeid} ({report.when}, {report.duration:.1f} s)")
            self.terminal.write_line(report.longreprtext)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        config.pluginmanager.register(_Printer(terminal))
