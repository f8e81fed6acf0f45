"""``pyvmm bench dirty``: what cannot be measured is one line and status 125."""

from __future__ import annotations

import pytest

from pyvmm.cli import main
from pyvmm.cli.bench import parse_shares


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "1X"], "--memory '1X': write a number"),
        (["--memory", "8M"], "--memory 8M: the guest that writes needs whole pages from 16M to 3G"),
        (["--memory", "4G"], "from 16M to 3G"),
        (["--dirty", "1,two"], "--dirty '1,two': write percentages from 0 to 100"),
        (["--dirty", "101"], "from 0 to 100"),
        (["--dirty", "nan"], "from 0 to 100"),
        (["--dirty", ""], "from 0 to 100"),
        (["--rounds", "0"], "--rounds '0': write a number from 1 to 1000"),
        (["--rounds", "99999999999"], "from 1 to 1000"),
        (["--guest", "/nowhere/dirtier.elf"], "--guest /nowhere/dirtier.elf: there is no such file; make guests"),
    ],
)
def test_bad_options_are_one_clear_line(capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    assert main(["bench", "dirty", *options]) == 125
    printed = capsys.readouterr()
    assert printed.out == "" and words in printed.err and printed.err.count("\n") == 1


def test_shares() -> None:
    assert parse_shares("0,0.5,100") == [0.0, 0.5, 100.0]
