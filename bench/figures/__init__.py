"""What all benchmarks share: medians of interleaved rounds, facts about the host, and the one JSON document.

The machines these run on are noisy (shared cores, a VM below the VM), so contestants take turns (A B A B) and
every figure is the median of its rounds with the extremes beside it; ratios are medians of the ratios *within*
rounds, which a slow minute hits on both sides.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pyvmm.errors import PyvmmError

REPOSITORY = Path(__file__).resolve().parents[2]
PYVMM = (sys.executable, "-m", "pyvmm")
"""The program under test, run by the interpreter that runs the benchmark."""


class Figure(msgspec.Struct, frozen=True):
    """One measured quantity."""

    median: float
    least: float
    most: float
    rounds: int
    unit: str


def figure(values: Sequence[float], unit: str, digits: int = 2) -> Figure:
    """Median and extremes of one value a round."""
    return Figure(
        round(statistics.median(values), digits), round(min(values), digits), round(max(values), digits),
        len(values), unit,
    )  # fmt: skip


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Figure:
    """How many times ``theirs`` ``ours`` is, round by round."""
    return figure([mine / other for mine, other in zip(ours, theirs, strict=True)], "times", 3)


def verdict(value: float, target: float) -> dict[str, Any]:
    """A figure held to its target, which is a maximum."""
    return {"value": value, "target_at_most": target, "met": value <= target}


def host_facts() -> dict[str, Any]:
    """What one must know about the host to compare figures: kernel, CPU, KVM's kind and quirks, load."""
    facts: dict[str, Any] = {
        "kernel": f"{os.uname().sysname} {os.uname().release}",
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": sys.version.split()[0],
    }
    try:
        from pyvmm.host.profile import load_profile

        profile = load_profile()
        facts |= {"kvm": profile.kind, "nested": profile.nested, "quirks": list(profile.quirks)}
    except PyvmmError as error:
        facts["kvm"] = str(error)
    return facts


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def document(*, what: str, against: str, **parts: Any) -> dict[str, Any]:
    """``parts`` (figures, ratio, target, ...) between what was measured and where."""
    return {
        "what": what,
        "against": against,
        **parts,
        "command": shlex.join([os.path.basename(sys.executable), *sys.argv]),
        "host": host_facts(),
    }


def child_environment(**changes: str) -> dict[str, str]:
    """The environment a user would have: .pyc files are written and used, this checkout is imported."""
    environment: dict[str, str] = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPROFILEIMPORTTIME", "PYTHONTRACEMALLOC", "PYTHONDEVMODE")
    }
    environment["PYTHONPATH"] = str(REPOSITORY)
    return environment | changes


def main(measure: Callable[[], Mapping[str, Any]]) -> None:
    """Print the document that ``measure`` makes; one that says why, and status 125, if measuring failed."""
    try:
        found = measure()
    except PyvmmError as error:
        print(msgspec.json.format(msgspec.json.encode({"failed": str(error), "host": host_facts()})).decode())
        sys.exit(error.exit_status)
    print(msgspec.json.format(msgspec.json.encode(found)).decode())
