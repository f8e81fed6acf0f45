"""The import rule, read from pyvmm's sources; and the sizes and names of files.

``LAYERS`` says what each folder may import besides itself. An import inside a function counts like one at the
top (it is lazy, not another direction), and so does one under TYPE_CHECKING: to know a type is to depend on it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pyvmm"

_BASE = {"errors", "trace", "native", "registers"}
_LOW = _BASE | {"memory"}
_DEVICES = _LOW | {"devices", "virtio", "block", "net"}
_MACHINE = _DEVICES | {"kvm", "arch", "host"}
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "registers": set(),
    "svg": set(),
    "trace": {"errors"},
    "native": {"errors"},
    "kvm": _BASE,
    "memory": _BASE,
    "arch": _LOW | {"kvm"},
    "host": _LOW | {"kvm", "arch"},
    "devices": _LOW,
    "block": _LOW,
    "net": _LOW,
    "virtio": _LOW | {"devices", "block", "net"},
    "machine": _MACHINE,
    "migration": _MACHINE | {"machine"},
    "colo": _MACHINE | {"machine", "migration"},
    "gdb": _MACHINE | {"machine"},
    "qmp": _MACHINE | {"machine", "migration", "colo", "gdb"},
    "testing": {"errors"},
    "explain": _MACHINE | {"machine", "gdb", "svg"},
    "demo": _MACHINE | {"svg", "machine", "migration", "colo", "qmp"},
    "dashboard": _MACHINE | {"machine", "qmp"},
    "cli": _MACHINE | {"machine", "migration", "colo", "qmp", "dashboard", "testing", "demo", "explain"},
    "__main__": {"cli"},
    "api": _LOW | {"kvm", "arch", "host"},
    "__init__": {"api"},
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
LONGEST = 420


def imports(source: str, module: str, *, is_package: bool) -> list[tuple[int, str]]:
    """(line, imported pyvmm module) for each import anywhere in ``source``; relative ones resolved."""
    found = []
    parts = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = node.level - 1 if is_package else node.level
            base = ".".join(parts[: len(parts) - up]) if node.level else ""
            name = ".".join(piece for piece in (base, node.module or "") if piece)
            if name == "pyvmm":  # from pyvmm import errors
                found += [(node.lineno, f"pyvmm.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, name))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name | ast.Attribute)
            and (node.func.id if isinstance(node.func, ast.Name) else node.func.attr) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append((node.lineno, str(node.args[0].value)))
    return [(line, name) for line, name in found if name.startswith("pyvmm.")]


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Imports in ``module`` that go against the rule."""
    parts = module.split(".")
    own = parts[1] if len(parts) > 1 else "__init__"
    if own not in LAYERS:
        return [f"{module}: {own} has no place in LAYERS"]
    return [
        f"{module}:{line}: {own} must not import {name}"
        for line, name in imports(source, module, is_package=is_package)
        if (target := name.split(".")[1]) != own and target not in LAYERS[own] and not target.startswith("__")
    ]


def modules() -> list[tuple[Path, str]]:
    """Every module of the package with its dotted name."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((path, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)))
    return found


def test_the_layers_have_no_circle() -> None:
    seen: set[str] = set()
    while len(seen) < len(LAYERS):
        ready = {layer for layer, below in LAYERS.items() if below <= seen} - seen
        assert ready, f"circle among {LAYERS.keys() - seen}"
        seen |= ready


def test_nobody_imports_against_the_rule() -> None:
    assert len(modules()) > 20, "the scan finds nothing: it is broken"
    found = [
        sentence
        for path, name in modules()
        for sentence in violations(path.read_text(encoding="utf-8"), name, is_package=path.name == "__init__.py")
    ]
    assert found == []


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("pyvmm.devices.serial", "from pyvmm.kvm.vm import Vm", True),
        ("pyvmm.devices.serial", "import pyvmm.arch.x86.layout", True),
        ("pyvmm.devices.serial", "def f():\n    from pyvmm.machine import Machine", True),
        ("pyvmm.devices.serial", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pyvmm.kvm", True),
        ("pyvmm.devices.serial", "from ..kvm import vm", True),
        ("pyvmm.devices.serial", "from pyvmm import kvm", True),
        ("pyvmm.devices.serial", "import importlib\nimportlib.import_module('pyvmm.kvm')", True),
        ("pyvmm.devices.serial", "from pyvmm.devices.irq import IrqOutput\nfrom . import bus\nimport os", False),
        ("pyvmm.devices.serial", "from pyvmm.memory.guest_memory import GuestMemory", False),
        ("pyvmm.kvm.vm", "from pyvmm.devices.bus import Bus", True),
        ("pyvmm.memory.dirty", "from pyvmm.kvm.vm import Vm", True),
        ("pyvmm.machine.builder", "from pyvmm.cli import main", True),
        ("pyvmm.machine.builder", "from pyvmm import __version__\nfrom pyvmm.host import profile", False),
        ("pyvmm.newfolder.x", "", True),
    ],
)
def test_the_scan_sees_every_kind_of_import(module: str, source: str, bad: bool) -> None:
    assert bool(violations(source, module)) == bad


def test_relative_imports_of_a_package_start_at_itself() -> None:
    assert imports("from .x import y\nfrom ..kvm import vm", "pyvmm.devices", is_package=True) == [
        (1, "pyvmm.devices.x"),
        (2, "pyvmm.kvm"),
    ]


def test_no_module_is_named_after_nothing() -> None:
    assert [name for _, name in modules() if FORBIDDEN_NAMES & set(name.split("."))] == []


def test_no_file_is_too_long() -> None:
    too_long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for folder in ("pyvmm", "tests", "bench")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".py", ".pyi", ".c", ".h", ".S")
        and path.name != "_native.c"  # generated by cffi
        and (lines := path.read_bytes().count(b"\n")) > LONGEST
    ]
    assert too_long == []
