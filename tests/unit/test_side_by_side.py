"""How `make test` divides the tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import side_by_side
from tests.side_by_side import TESTS, Part, main, parts


def test_no_test_is_left_out_and_none_is_run_twice() -> None:
    dealt = [Path(name) for part in parts() for name in part.what]
    files = [path.relative_to(TESTS.parent) for path in TESTS.rglob("test_*.py")]
    assert files and all(sum(each in (file, *file.parents) for each in dealt) == 1 for file in files)
    assert all((TESTS.parent / each).exists() for each in dealt)


@pytest.mark.parametrize("failing", ["", "computing", "booting", "rest"])
def test_a_failure_of_any_part_is_one_of_all(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(part: Part) -> subprocess.Popen[bytes]:
        part.log.touch()
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({int(part.name == failing)})"])

    monkeypatch.setattr(Part, "start", start)
    monkeypatch.setattr(side_by_side, "RESULTS", tmp_path)
    assert main() == (1 if failing else 0)
