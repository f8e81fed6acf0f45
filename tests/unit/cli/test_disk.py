"""``pyvmm disk``: an overlay's life from the command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyvmm.block.overlay import open_overlay
from pyvmm.cli import main


def test_an_overlay_is_made_committed_and_emptied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, over = tmp_path / "base.img", str(tmp_path / "over.img")
    base.write_bytes(os.urandom(64 << 10))
    before = base.read_bytes()
    assert main(["disk", "create", over, str(base)]) == 0
    with open_overlay(over, str(base)) as overlay:
        overlay.write(4096, b"n" * 8192)
    assert main(["disk", "info", over]) == 0
    said = capsys.readouterr().out
    assert f"base: {base}\nsize: 65536\nstate: clean\n" in said
    assert base.read_bytes() == before
    assert main(["disk", "commit", over]) == 0
    assert capsys.readouterr().out == f"8 KiB moved into {base}\n"
    assert base.read_bytes() == before[:4096] + b"n" * 8192 + before[12288:]
    with open_overlay(over, str(base)) as overlay:
        overlay.write(0, b"gone")
    assert main(["disk", "discard", over]) == 0
    with open_overlay(over, str(base)) as overlay:
        assert overlay.clusters_used == 0 and overlay.read(0, 4) == before[:4]


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, over = tmp_path / "base.img", str(tmp_path / "over.img")
    base.write_bytes(bytes(4096))
    for arguments, reason in (
        (["info", over], "no such file"),
        (["info", str(base)], "is no overlay"),
        (["create", str(base), str(base)], "File exists"),
        (["commit", str(base)], "is no overlay"),
    ):
        assert main(["disk", *arguments]) == 125
        said = capsys.readouterr().err
        assert reason in said and said.count("\n") == 1, said
    assert base.read_bytes() == bytes(4096)
