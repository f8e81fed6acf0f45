"""The book's exercises: a skeleton is no answer, a right one is taken, wrong ones are not, and all of it ends."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.framework.processes import REPOSITORY

EXERCISES = REPOSITORY / "docs" / "exercises"
CHECK = EXERCISES / "check.py"
ANSWERS = Path(__file__).parent / "answers"
NUMBERS = range(1, 12)
JUDGED = {
    1: "CODE", 2: "CODE", 3: "CODE", 4: "protect", 5: "CODE", 6: "CountingDoubler", 7: "offer_read", 8: "messages",
    9: "migrate", 10: "may_stop", 11: "goes_on_from",
}  # fmt: skip


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    return load(EXERCISES / "checks.py")


def only(folder: Path, number: int) -> Path:
    (path,) = folder.glob(f"{number:02}_*.py")
    return path


def judge(checks: ModuleType, number: int, answer: Any) -> str:
    return str(checks.CHECKS[number](answer))


@pytest.mark.parametrize("number", NUMBERS)
def test_an_exercise_tells_right_from_wrong(number: int, checks: ModuleType) -> None:
    assert sorted(checks.CHECKS) == list(NUMBERS)
    with pytest.raises(checks.NotYet):
        judge(checks, number, load(only(EXERCISES, number)))
    answer = load(only(ANSWERS, number))
    assert judge(checks, number, answer)
    assert answer.WRONG
    for name, wrong in answer.WRONG.items():
        setattr(answer, JUDGED[number], wrong)
        with pytest.raises(checks.NotYet):
            pytest.fail(f"{name}: taken for right: {judge(checks, number, answer)}")


def run(*words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(CHECK), *words], capture_output=True, text=True, timeout=60, check=False, cwd=REPOSITORY
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def test_as_a_learner_runs_it(tmp_path: Path) -> None:
    status, text = run()
    assert status == 0 and len(text.splitlines()) == len(NUMBERS)
    assert "docs/exercises/03_exits.py: A guest that reads a text" in text
    status, text = run("3")
    assert (status, text.splitlines()[0]) == (1, "3: not yet: that took 40 exits")
    assert "hint: one instruction does it all" in text
    status, text = run("3", str(only(ANSWERS, 3)))
    assert status == 0 and text.startswith("3: right: 40 bytes in ")
    assert run("12")[0] == run("x")[0] == run("3", "nowhere.py")[0] == 2
    broken = tmp_path / "mine.py"
    for text, says in (
        ("CODE = 5", "CODE has to be bytes"), ("x = 1", "CODE has to be bytes"), ("1 / 0", "ZeroDivisionError"),
        ("CODE = b'\\xeb\\xfe'", "does not end"), ("import os; os.abort()", ""),
    ):  # fmt: skip
        broken.write_text(text)
        status, said = run("1", str(broken))
        assert status != 0 and says in said, said


def test_the_book_leads_there() -> None:
    for chapter in (REPOSITORY / "docs").glob("[0-9]*.md"):
        name = only(EXERCISES, int(chapter.name[:2])).name
        assert f"(exercises/{name})" in chapter.read_text(), f"{chapter.name} does not lead to {name}"
