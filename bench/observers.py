"""What observers cost while nobody observes: pyvmm as it is, against a copy in which nobody ever could.

Of trace events, the debugger, explain, counters and the dashboard something is left in the code that runs at each exit:
``T.event.on and ...``, a look whether a debugger steps. The copy has none of that: its Python is the same without those
statements, its native core without those conditions. ``pio_exit.py`` then measures both, in turns, each time against
its C loop, and the ratios to that loop are compared. Takes about two minutes.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from figures import REPOSITORY, document, main, paired_ratio, verdict

from pyvmm.errors import HostError

ROUNDS = 9
MOST = 1.02
NATIVE_HOOKS = {
    "if (vcpu->debug.finish_access)\n": "if (0)\n",
    "return vcpu->debug.finish_access && stepped_over_access(vcpu) ?": "return 0 && stepped_over_access(vcpu) ?",
    "if (pv_debug_stepping(vcpu))\n\t\t\tvcpu->debug": "if (0)\n\t\t\tvcpu->debug",
}
"""In vcpu_run.c; each is there once."""


class WithoutEvents(ast.NodeTransformer):
    """Takes out ``T.event.on and T.event(...)``."""

    def __init__(self) -> None:
        self.removed = 0

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        value = node.value
        if (
            isinstance(value, ast.BoolOp)
            and isinstance(value.op, ast.And)
            and isinstance(value.values[0], ast.Attribute)
            and value.values[0].attr == "on"
        ):
            self.removed += 1
            return ast.copy_location(ast.Pass(), node)
        return node


def make_copy(folder: Path) -> int:
    """pyvmm without observers in ``folder``; how many places are gone."""
    package = folder / "pyvmm"
    shutil.copytree(REPOSITORY / "pyvmm", package, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_native.c"))
    places = 0
    for path in package.rglob("*.py"):
        transformer = WithoutEvents()
        tree = transformer.visit(ast.parse(path.read_text(encoding="utf-8")))
        if transformer.removed:
            path.write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding="utf-8")
            places += transformer.removed
    run = package / "native" / "vcpu_run.c"
    text = run.read_text(encoding="utf-8")
    for hook, nothing in NATIVE_HOOKS.items():
        if text.count(hook) != 1:
            raise HostError(f"not measured: vcpu_run.c has {hook.strip()!r} {text.count(hook)} times, not once")
        text = text.replace(hook, nothing)
        places += 1
    run.write_text(text, encoding="utf-8")
    subprocess.run(
        [sys.executable, "pyvmm/native/build.py"], cwd=folder, check=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    return places


def ratios(root: Path) -> dict[str, float]:
    """pio_exit.py's, with the pyvmm of ``root``."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("pio_exit.py"))], env=os.environ | {"PYTHONPATH": str(root)},
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)["ratio"]
    return found


def measure() -> dict[str, Any]:
    """Both in turns."""
    with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as folder:
        without = Path(folder)
        places = make_copy(without)
        both = [(ratios(REPOSITORY), ratios(without)) for _ in range(ROUNDS)]
    figures = {
        name: {"off_against_none": paired_ratio([as_is[name] for as_is, _ in both], [none[name] for _, none in both])}
        for name in both[0][0]
    }
    return document(
        what=f"one port access with observers that are off ({places} places in the code)",
        against="the same pyvmm without those places, each held against pio_exit.py's C loop in turns",
        figures=figures,
        ratio={name: each["off_against_none"].median for name, each in figures.items()},
        target={name: verdict(each["off_against_none"].median, MOST) for name, each in figures.items()},
    )


if __name__ == "__main__":
    main(measure)
