"""The lab's JUnit files, by test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree


@dataclass(frozen=True)
class Outcome:
    """One case of a test: ``kind`` is passed, failed or skipped, ``text`` what pytest says of the last two."""

    case: str
    kind: str
    text: str
    seconds: float


def read_outcomes(reports: Iterable[Path]) -> dict[tuple[str, str], list[Outcome]]:
    """(file relative to tests/, test) -> its cases; a report that is missing or cut short adds nothing."""
    found: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for path in reports:
        try:
            root = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, OSError):
            continue
        for case in root.iter("testcase"):
            found[_test_of(case)].append(_outcome(case))
    return found


def _test_of(case: ElementTree.Element) -> tuple[str, str]:
    """pytest writes a class name of modules and classes, ``tests.kvm.test_x.TestY``, and the case's name."""
    modules = case.get("classname", "").removeprefix("tests.").split(".")
    last = max((at for at, name in enumerate(modules) if name.startswith("test_")), default=len(modules) - 1)
    name = case.get("name", "").split("[")[0]
    return "/".join(modules[: last + 1]) + ".py", "::".join([*modules[last + 1 :], name])


def _outcome(case: ElementTree.Element) -> Outcome:
    name, seconds = case.get("name", ""), float(case.get("time", "0"))
    bad = [one for one in case if one.tag in ("failure", "error")]
    if bad:
        return Outcome(name, "failed", "\n".join(f"{one.get('message', '')}\n{one.text or ''}" for one in bad), seconds)
    skipped = case.find("skipped")
    if skipped is not None:
        return Outcome(name, "skipped", skipped.get("message", ""), seconds)
    return Outcome(name, "passed", "", seconds)
