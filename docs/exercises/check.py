"""Judges an answer to an exercise of the book::

    .venv/bin/python docs/exercises/check.py                # which there are
    .venv/bin/python docs/exercises/check.py 3              # look at docs/exercises/03_exits.py
    .venv/bin/python docs/exercises/check.py 3 mine.py      # or at another file

What the answer does is judged, in a real guest wherever it is about one, not how it is written. It runs in a process of
its own, which is ended if it takes too long. Status 0: right; 1: not yet; 2: there is nothing to judge.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import traceback
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
DEADLINE = 30.0
RIGHT, NOT_YET, NOTHING = 0, 1, 2


def files() -> dict[int, Path]:
    """The skeletons, by chapter."""
    return {int(path.name[:2]): path for path in sorted(HERE.glob("[0-9][0-9]_*.py"))}


def main(words: list[str]) -> int:
    """What the command line says."""
    if not words:
        for number, path in files().items():
            print(f"{number:3}  {path.relative_to(HERE.parents[1])}: {task_of(path)}")
        return RIGHT
    number = int(words[0]) if words[0].isdecimal() else 0
    if number not in files() or len(words) > 2:
        print(f"there is no exercise {words[0]}; without arguments this lists them", file=sys.stderr)
        return NOTHING
    path = Path(words[1]) if len(words) == 2 else files()[number]
    if not path.is_file():
        print(f"{path}: there is no such file", file=sys.stderr)
        return NOTHING
    command = [sys.executable, __file__, "--inside", str(number), str(path)]
    try:
        return subprocess.run(command, timeout=DEADLINE, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"{number}: not yet: it did not come to an end within {DEADLINE:.0f} s")
        return NOT_YET


def task_of(path: Path) -> str:
    """The first line of the skeleton."""
    return path.read_text(encoding="utf-8").split("\n", 1)[0].strip('"')


def load(path: Path) -> ModuleType:
    """The answer, as a module."""
    spec = importlib.util.spec_from_file_location("answer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inside(number: int, path: Path) -> int:
    """Judge, in this process."""
    sys.path.insert(0, str(HERE))
    from checks import CHECKS, NotYet

    try:
        said = CHECKS[number](load(path))
    except NotYet as why:
        print(f"{number}: not yet: {why}")
        if why.hint:
            print(f"   hint: {why.hint}")
        return NOT_YET
    except Exception as error:
        place = next((f"line {one.lineno}: " for one in traceback.extract_tb(error.__traceback__)[::-1]
                      if one.filename == str(path)), "")  # fmt: skip
        print(f"{number}: not yet: {place}{type(error).__name__}: {error}")
        return NOT_YET
    print(f"{number}: right: {said}")
    return RIGHT


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(inside(int(sys.argv[2]), Path(sys.argv[3]).resolve()))
    sys.exit(main(sys.argv[1:]))
