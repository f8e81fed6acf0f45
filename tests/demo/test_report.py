"""The demo's report, looked at in a real browser."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import pytest

from pyvmm.demo.outcome import DemoOptions, Failure, Mark, Outcome
from pyvmm.demo.report import write_report
from pyvmm.demo.watch import Checkpoint, Held
from pyvmm.demo.workload import Exchange, Verdict
from tests.framework.browser import chromium, look

pytestmark = pytest.mark.timeout(120)
HOSTILE = "</text></svg><script>console.error('from a problem')</script>"
CLIENTS, CHECKPOINTS = 3, 40


@pytest.fixture(scope="module")
def browser() -> str:
    return chromium()


def outcome() -> Outcome:
    """One that went as it should, with all there can be in it."""
    made = Outcome(DemoOptions(clients=CLIENTS), "a guest", 1000.0)
    made.failures = [Failure("primary", 1005.0, "alice", "bob", 1005.05, 12.5, 1007.0, [0.1, 0.2, 0.3])]
    made.marks = [Mark(1001.0, "protected", "protected"), Mark(1005.0, HOSTILE, "death"), Mark(1005.05, "on", "rescue")]
    made.machines = [("alice", "primary", 1000.0, 1005.0), ("bob", "secondary", 1000.5, 1010.0)]
    made.checkpoints = [
        Checkpoint("alice", i, 1001 + i / 10, 0.5 + i, 3.0 + i, 10, 4096, "periodic") for i in range(CHECKPOINTS)
    ]
    made.held = [Held(1001 + i / 10, i % 5) for i in range(50)]
    made.exchanges = [
        Exchange(client, i, at := 1001 + i / 50, at + 0.001 * client) for client in (1, 2, 3) for i in range(400)
    ]
    made.differences = [f"tcp, at 12: {HOSTILE}"]
    made.verdict = Verdict(ok=True, text="linearizable", writes_lost=0, problems=[HOSTILE])
    return made


def test_it_is_drawn_and_says_what_happened(browser: str, tmp_path: Path) -> None:
    page = write_report(outcome(), tmp_path / "new")
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"https?:|src=|@import|url\(", text) == []  # it needs nothing from elsewhere
    dom, console = look(browser, page, "--dump-dom")
    assert console == []
    assert (dom.count("<svg"), dom.count("</svg>"), dom.count("<script")) == (3, 3, 0)
    assert dom.count('class="checkpoint"') >= CHECKPOINTS
    assert dom.count('class="dots"') == 2 * CLIENTS
    assert dom.count('class="mark death"') == 2
    for words in ("no connection and no acknowledged write was lost", "median 200 ms, largest 300 ms", "linearizable"):
        assert words in dom
    pixels = picture(browser, page)
    assert len(set(pixels)) > 100


def test_what_went_wrong_is_said(browser: str, tmp_path: Path) -> None:
    made = outcome()
    assert made.ok
    made.verdict = Verdict(ok=True, text="linearizable", writes_lost=2)
    dom, _ = look(browser, write_report(made, tmp_path), "--dump-dom")
    assert "it did not go as it should" in dom
    assert "<td>acknowledged writes lost</td><td>2</td>" in dom


def test_a_run_that_ended_early_has_a_report_too(browser: str, tmp_path: Path) -> None:
    dom, console = look(browser, write_report(Outcome(DemoOptions(), "a guest", 5.0), tmp_path), "--dump-dom")
    assert (dom.count("<svg"), console) == (2, [])
    assert "it did not go as it should" in dom


def test_the_browser_would_tell(browser: str, tmp_path: Path) -> None:
    """An error on the console, and a blank page, are seen by these tests."""
    page = tmp_path / "bad.html"
    page.write_text("<!doctype html><script>console.error('seen')</script>", encoding="utf-8")
    _, console = look(browser, page, "--dump-dom")
    assert len(console) == 1
    assert len(set(picture(browser, page))) < 10


def picture(browser: str, page: Path) -> bytes:
    """The samples of a screenshot, as PNG filters leave them."""
    file = page.parent / "shot.png"
    look(browser, page, "--window-size=1200,1600", f"--screenshot={file}")
    data, at, packed = file.read_bytes(), 8, b""
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        packed += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    return zlib.decompress(packed)
