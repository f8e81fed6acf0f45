"""Every trace event is declared once and used, and every use fits its declaration.

Found by reading pyvmm's sources: a module binds a group by ``NAME = trace_group("folder")`` and then tests
``NAME.event.on`` and calls ``NAME.event(...)``.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import pytest

from pyvmm.trace.events import PACKAGE, all_declared_events
from pyvmm.trace.parser import EventDeclaration, parse_trace_events


class Use(NamedTuple):
    """One mention of an event. ``arguments``: how many a call has, None if it is only tested or not countable."""

    where: str
    group: str
    event: str
    arguments: int | None


def uses_in(source: str, where: str) -> list[Use]:
    """All mentions of trace events in ``source``."""
    tree = ast.parse(source)
    groups = {
        target.id: str(node.value.args[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name | ast.Attribute)
        and (node.value.func.id if isinstance(node.value.func, ast.Name) else node.value.func.attr) == "trace_group"
        and isinstance(node.value.args[0], ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (event := _event(node.func, groups)) is not None:
            exact = not node.keywords and not any(isinstance(arg, ast.Starred) for arg in node.args)
            # -1: keywords and stars never fit, since the backends take values by position.
            found.append(Use(f"{where}:{node.lineno}", *event, len(node.args) if exact else -1))
        elif isinstance(node, ast.Attribute) and (event := _event(node, groups)) is not None:
            found.append(Use(f"{where}:{node.lineno}", *event, None))
    return found


def _event(node: ast.expr, groups: dict[str, str]) -> tuple[str, str] | None:
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in groups:
        return groups[node.value.id], node.attr
    return None


def problems(declared: dict[str, list[EventDeclaration]], uses: list[Use]) -> list[str]:
    """What is wrong, one sentence each."""
    known = {(group, d.name): d for group, declarations in declared.items() for d in declarations}
    found = []
    for use in uses:
        declaration = known.get((use.group, use.event))
        if declaration is None:
            found.append(f"{use.where}: {use.event} is not declared in {use.group}/trace-events")
        elif use.arguments is not None and use.arguments != len(declaration.args):
            found.append(f"{use.where}: {use.event} takes {len(declaration.args)} arguments by position")
    called = {(use.group, use.event) for use in uses if use.arguments is not None}
    found += [f"{group}/trace-events: {name} is never traced" for group, name in sorted(known.keys() - called)]
    return found


def declared_in(package: Path) -> dict[str, list[EventDeclaration]]:
    """Group -> its declarations."""
    paths = sorted(package.rglob("trace-events"))
    return {path.parent.relative_to(package).as_posix(): parse_trace_events(path) for path in paths}


def test_pyvmms_events_are_declared_used_and_called_rightly() -> None:
    uses = [
        use
        for path in sorted(PACKAGE.rglob("*.py"))
        for use in uses_in(path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE.parent)))
    ]
    assert len(uses) > 20, "the scan finds nothing: it is broken"
    assert problems(declared_in(PACKAGE), uses) == []


def test_no_name_is_declared_in_two_folders() -> None:
    assert len(all_declared_events()) == sum(len(d) for d in declared_in(PACKAGE).values())


def test_every_format_takes_values_of_the_declared_types() -> None:
    for declaration in all_declared_events().values():
        for (kind, name), conversion in zip(declaration.args, declaration.conversions, strict=True):
            is_text = "char *" in kind
            assert (conversion == "s") == is_text, f"{declaration.name}: {kind} {name} with %{conversion}"


GOOD = """
from pyvmm.trace import trace_group
T = trace_group("net")
def f(a):
    T.sent.on and T.sent(a, 2)
"""


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (GOOD, None),
        (GOOD.replace("T.sent.on and T.sent(a, 2)", "pass"), "sent is never traced"),
        (GOOD.replace("T.sent.on and T.sent(a, 2)", "T.sent.on"), "sent is never traced"),
        (GOOD.replace("(a, 2)", "(a)"), "takes 2 arguments"),
        (GOOD.replace("(a, 2)", "(a, gpa=2)"), "takes 2 arguments"),
        (GOOD.replace("(a, 2)", "(*a)"), "takes 2 arguments"),
        (GOOD.replace("T.sent.on", "T.sennt.on"), "sennt is not declared"),
        (GOOD.replace('"net"', '"kvm"'), "sent is not declared in kvm/trace-events"),
        (GOOD.replace("from pyvmm.trace import", "import pyvmm.trace as t #").replace("= t", "= t.t"), None),
    ],
)
def test_the_scan_finds_each_kind_of_mistake(tmp_path: Path, source: str, problem: str | None) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "trace-events").write_text('sent(int a, int gpa) "%d %d"\n')
    found = problems(declared_in(tmp_path), uses_in(source, "m.py"))
    if problem is None:
        assert found == []
    else:
        assert any(problem in sentence for sentence in found), found
