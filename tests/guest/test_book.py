"""The book (docs/) says what is true: its programs and commands are run, and print what stands below them; what it
points to exists.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.framework.processes import REPOSITORY

DOCS = REPOSITORY / "docs"
CHAPTERS = sorted(DOCS.glob("[0-9]*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)#]+)\)")
DEADLINE = 60.0


class Block(NamedTuple):
    """``command`` is a shell's, or a program of Python's."""

    command: str | list[str]
    printed: str


def blocks(chapter: Path) -> list[Block]:
    found: list[Block] = []
    fences = FENCE.findall(chapter.read_text())
    for (kind, text), (after, output) in zip(fences, [*fences[1:], ("", "")], strict=True):
        if kind == "python":
            assert after == "text", f"{chapter.name}: a program without what it prints"
            found.append(Block([sys.executable, "-c", text], output))
        elif kind == "console":
            pieces = (piece.partition("\n") for piece in re.split(r"^\$ ", text, flags=re.M)[1:])
            found += [Block(command, expected) for command, _, expected in pieces]
    return found


def fits(pattern: str, printed: str) -> bool:
    """``...`` stands for anything: lines where it is one, else characters."""
    lines = [re.escape(line).replace(re.escape("..."), ".*") + r"\r?\n" for line in pattern.splitlines()]
    expression = "".join(r"(?:.*\n)*?" if line == r".*\r?\n" else line for line in lines)
    return re.fullmatch(expression, printed) is not None


def test_what_fits() -> None:
    assert fits("a\n...\nb 1\n", "a\nx\ny\nb 1\n") and fits("a\n...\n", "a\n") and fits("took ... ms\n", "took 3 ms\n")
    assert not fits("a\n", "a\nb\n") and not fits("a\n...\nb\n", "a\nc\n") and not fits("a...c\n", "abd\n")


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_does_what_it_says(chapter: Path) -> None:
    there = blocks(chapter)
    assert there, "nothing in it is run"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for block in there:
        done = subprocess.run(
            block.command, shell=isinstance(block.command, str), cwd=REPOSITORY, env=os.environ | {"PATH": path},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip
        assert fits(block.printed, done.stdout), (block, done.stdout, done.stderr)


@pytest.mark.parametrize("page", [*CHAPTERS, DOCS / "README.md"], ids=lambda path: path.stem)
def test_what_it_points_to_is_there(page: Path) -> None:
    targets = LINK.findall(page.read_text())
    assert targets
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing
