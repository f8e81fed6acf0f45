"""The outermost layer: which status a failure gets, and standard streams that are closed or broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.cli import main, run

PROGRAM = [sys.executable, "-m", "pyvmm"]


def test_a_defect_is_one_line_and_not_a_status_a_guest_could_mean(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(args: object, quirks: object) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(run, "config_of", broken)
    assert main(["run", "x"]) == 125
    said = capsys.readouterr().err
    assert said == "pyvmm: internal error: ZeroDivisionError: two lines (pyvmm --debug shows where)\n"
    assert main(["--debug", "run", "x"]) == 125
    assert capsys.readouterr().err.startswith("Traceback")


def test_output_that_nobody_reads_is_no_python_error() -> None:
    """Python's own status for it is 120, with a message at interpreter exit."""
    out, into = os.pipe()
    os.close(out)
    done = subprocess.run([*PROGRAM, "doctor", "--json"], stdout=into, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(into)
    assert (done.returncode, done.stderr) == (125, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_nobody_elses(closed: str, tmp_path: Path) -> None:
    """Otherwise the first files opened get their numbers, and messages or guest output go into them."""
    code = "import os, pyvmm.cli, json, sys; pyvmm.cli._open_missing_streams(); print('out'); "
    code += "print('err', file=sys.stderr); fds = [os.readlink(f'/proc/self/fd/{n}') for n in range(3)]; "
    code += "fd = os.open('/', 0); open(sys.argv[1], 'w').write(json.dumps([fds, fd]))"
    command = f'exec "$@" {closed}'
    subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-c", code, str(tmp_path / "said")],
        timeout=60, check=True, input=b"", capture_output=True,
    )  # fmt: skip
    fds, first = json.loads((tmp_path / "said").read_text())
    numbers = {"<&-": [0], ">&-": [1], "2>&-": [2]}.get(closed, [0, 1, 2])
    assert [n for n in range(3) if fds[n] == os.devnull] == numbers
    assert first > 2
