"""TAP 14 (testanything.org/tap-version-14-specification): a test point per image, a subtest with its verdicts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pyvmm.testing.report import Case
from pyvmm.testing.result import Result


def tap_lines(results: Iterable[Result]) -> Iterator[str]:
    """The document, line by line, without newlines."""
    yield "TAP version 14"
    number = 0
    for number, result in enumerate(results, 1):
        yield from _point(number, result)
    yield f"1..{number}" if number else "1..0 # SKIP nothing was to be run"


def _point(number: int, result: Result) -> Iterator[str]:
    name = _text(result.name)
    cases = result.report.cases
    if cases:
        yield f"# Subtest: {name}"
        for index, case in enumerate(cases, 1):
            yield "    " + _case(index, case)
        yield f"    1..{len(cases)}"
    verdict = "not ok" if result.failed else "ok"
    directive = f" # SKIP {_text(result.reason)}" if result.outcome == "skip" else ""
    yield f"{verdict} {number} - {name}{directive}"
    if result.failed:
        yield f"# {_text(result.reason)}"
    for note in result.notes:
        yield f"# {_text(note)}"


def _case(number: int, case: Case) -> str:
    verdict, directive = {
        "PASS": ("ok", ""),
        "FAIL": ("not ok", ""),
        "SKIP": ("ok", " # SKIP"),
        "XFAIL": ("not ok", " # TODO expected to fail"),  # a TODO point that fails is no failure
        "KFAIL": ("not ok", " # TODO known to fail"),
        "XPASS": ("not ok", ""),
        "KPASS": ("not ok", ""),
    }[case.verdict]
    passed_after_all = " (passed, expected to fail)" if case.verdict in ("XPASS", "KPASS") else ""
    return f"{verdict} {number} - {_text(case.name)}{passed_after_all}{directive}"


def _text(text: str) -> str:
    """One line; ``#`` and backslash would mean something."""
    # Not printable are also surrogates, which a file name may have and no encoding takes.
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown.replace("\\", "\\\\").replace("#", "\\#").strip() or "?"
