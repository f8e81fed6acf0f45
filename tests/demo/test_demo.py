"""The demo as a user runs it, for each failure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.framework.processes import pyvmm, refused

pytestmark = [pytest.mark.kvm, pytest.mark.net, pytest.mark.timeout(300)]
FAILURES = [("primary", "hybrid"), ("secondary", "periodic"), ("link", "hybrid")]
GOES_ON = {"primary": "bob", "secondary": "alice"}


def shown(*options: str) -> str:
    """What a demo that went as it should has printed."""
    done = pyvmm("colo", "demo", *options, timeout=280)
    text = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b""), text + done.stderr.decode()
    return text


def row(text: str, what: str) -> str:
    """That of the table."""
    found = re.search(rf"^│ {what} +│ (.*?) *│$", text, re.M)
    assert found is not None, text
    return found[1]


@pytest.mark.parametrize(("kill", "mode"), FAILURES)
def test_clients_of_a_bare_guest_notice_nothing(tmp_path: Path, kill: str, mode: str) -> None:
    text = shown("--vm", "bare", "--kill", kill, "--mode", mode, "--seconds", "3", "--clients", "3",
                 "--report", str(tmp_path))  # fmt: skip
    alone = re.search(r"^ +[0-9.]+ s  (alice|bob) goes on alone, ([0-9]+) ms after it$", text, re.M)
    assert alone is not None, text
    assert kill == "link" or alone[1] == GOES_ON[kill]
    assert f"carol protects {alone[1]}'s guest" in text
    assert row(text, "connections lost") == "0"
    assert int(row(text, "requests answered").split()[0]) > 100
    assert int(row(text, "checkpoints").split()[0]) >= (2 if mode == "hybrid" else 10)
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no connection and no acknowledged write was lost" in report
    assert {path.name for path in tmp_path.glob("*.log")} == {"alice.log", "bob.log", "carol.log"}


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--clients", "0"), "--clients 0"), (("--seconds", "0.5"), "--seconds 0.5"), (("--report", "FILE"), "is a file")],
)
def test_nonsense_is_refused(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    assert says in refused("colo", "demo", *(word.replace("FILE", str(file)) for word in options))
    assert file.read_bytes() == b"mine"
