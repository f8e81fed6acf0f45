"""A package of two folders with trace events of its own, so that tests do not depend on pyvmm's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.trace import control, events

NET = """\
# a comment

net_send(int queue, uint64_t gpa, const char *name) "queue %d gpa 0x%" PRIx64 " %s"
net_poll_begin(void) "polling"
net_poll_end(unsigned packets) "%u packets"
"""
DISK = 'disk_read(uint64_t sector, size_t bytes) "sector %" PRIu64 " bytes %zu"\n'


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for folder, text in (("net", NET), ("block/disk", DISK)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "trace-events").write_text(text)
    monkeypatch.setattr(events, "PACKAGE", tmp_path)
    monkeypatch.setattr(events, "_groups", {})
    monkeypatch.setattr(events, "_new_group", None)
    yield tmp_path
    control.close_all()
