"""The demo as a user runs it, for each failure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.framework.processes import pyvmm, refused

pytestmark = [pytest.mark.kvm, pytest.mark.net, pytest.mark.timeout(300)]
FAILURES = {"hybrid": "primary,secondary,link", "periodic": "primary,link"}
LINE = re.compile(r"^ +[0-9.]+ s  (.*)$", re.M)


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


def check(text: str, kill: str) -> None:
    """Each failure, in its turn, left the right one alone, who then was protected again; and nothing was lost."""
    lines = iter(LINE.findall(text))
    primary, secondary = "alice", "bob"
    assert f"bob protects {primary}" in next(line for line in lines if "protects" in line)
    for what in kill.split(","):
        happened = next(line for line in lines if "SIGKILL" in line or "silent" in line)
        (survivor,) = next(match for line in lines if (match := re.findall(r"^(.*) goes on alone", line)))
        if what == "link":
            assert "silent" in happened
        else:
            victim = primary if what == "primary" else secondary
            assert happened == f"SIGKILL for {victim}, the {what}"
            assert survivor == (secondary if what == "primary" else primary)
        said = next(line for line in lines if "protects" in line)
        secondary, primary = re.findall(r"^(.*) protects (.*)'s guest", said)[0]
        assert primary == survivor
    assert (row(text, "connections lost"), row(text, "acknowledged writes lost")[0]) == ("0", "0")
    assert int(row(text, "requests answered").split()[0]) > 50


@pytest.mark.parametrize(("mode", "kill"), FAILURES.items())
def test_clients_of_a_bare_guest_notice_nothing(tmp_path: Path, mode: str, kill: str) -> None:
    text = shown("--vm", "bare", "--kill", kill, "--mode", mode, "--seconds", "2", "--clients", "3",
                 "--report", str(tmp_path))  # fmt: skip
    check(text, kill)
    checkpoints = int(row(text, "checkpoints").split()[0])
    assert checkpoints >= (4 if mode == "hybrid" else 20)
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "no connection and no acknowledged write was lost" in report
    assert {path.stem for path in tmp_path.glob("*.log")} >= {"alice", "bob", "carol"}


@pytest.mark.linux
def test_connections_to_linux_live_through_every_failure(tmp_path: Path) -> None:
    """Three times each."""
    kill = "primary,secondary,link"
    text = shown("--kill", kill, "--kills", "9", "--seconds", "3", "--clients", "3", "--report", str(tmp_path))
    check(text, ",".join([kill] * 3))
    assert row(text, "guest").startswith("Linux")
    assert row(text, "acknowledged writes lost") == "0"
    assert row(text, "history").startswith("linearizable")


@pytest.mark.parametrize(
    ("options", "says"),
    [(("--clients", "0"), "--clients 0"), (("--seconds", "0.5"), "--seconds 0.5"), (("--kills", "0"), "--kills 0"),
     (("--kill", "primary,both"), "both"), (("--report", "FILE"), "is a file")],
)
def test_nonsense_is_refused(tmp_path: Path, options: tuple[str, ...], says: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    assert says in refused("colo", "demo", *(word.replace("FILE", str(file)) for word in options))
    assert file.read_bytes() == b"mine"
