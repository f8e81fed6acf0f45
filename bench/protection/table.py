"""The README's table, out of the JSON document of bench/colo.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Document = Mapping[str, Any]
DEATHS = {"killed": "SIGKILL of the primary", "silent": "the primary silent, its connections open (SIGSTOP)"}


def table(found: Document) -> str:
    """Markdown. A target that was missed says so."""
    host = found["host"]
    lines = [
        f"{found['date']}; {found['host']['cpus']} CPUs ({host['cpu']}), {host['kernel']}, KVM {host['kvm']}, load "
        f"{host['load_1min']}; `{found['command']}`. Medians, the most in brackets.",
        "",
        *_checkpoints(found),
        "",
        *_ends(found),
        *(f"\n{why}" for why in found.get("not_measured", ())),
    ]
    return "\n".join(lines)


def _checkpoints(found: Document) -> list[str]:
    columns = (("pause", "ms"), ("received", "ms"), ("told", "ms"), ("cpu", "ms"), ("resident", "MiB"))
    lines = [
        "| pages per 100 ms | pause: pyvmm, QEMU | target | request to received: pyvmm, QEMU | failover when told: "
        "pyvmm, QEMU | CPU of both a checkpoint: pyvmm, QEMU | secondary's memory: pyvmm, QEMU |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pages in found["pages"]:
        cells = [
            f"{_cell(found, f'{name}_{pages}', 'pyvmm', unit)}, {_cell(found, f'{name}_{pages}', 'qemu', unit)}"
            + _missed(found, f"{name}_{pages}")
            for name, unit in columns
        ]
        allowed = found["target"][f"pause_{pages}"]["target_at_most"]
        cells.insert(1, f"{allowed:.1f} ms (memcpy {_number(found['figures'][f'memcpy_{pages}']['median'])} ms)")
        lines.append(f"| {pages:,} | " + " | ".join(cells) + " |")
    return lines


def _ends(found: Document) -> list[str]:
    figures, targets = found["figures"], found["target"]
    lines = ["| pyvmm | seen | target |", "| --- | --- | --- |"]
    for key, target in targets.items():
        how, _, rest = key.partition("_")
        if how in DEATHS:
            mode, _, arbiter = rest.partition("_")
            lines.append(
                f"| {DEATHS[how]}, until the guest runs; {mode}, arbiter {arbiter} | {_value(figures[key]['pyvmm'])} ms"
                f"{_missed(found, key)} | {target['target_at_most']:g} ms |"
            )
        elif how == "work":
            one = figures[key]
            lines.append(
                f"| throughput of a guest that works half of the time and writes 1,000 pages a second, {rest}, "
                f"{one['delay']} ms | {one['throughput']['median']:.1%}; while it works {one['speed']['median']:.1%}"
                f"{_missed(found, key)} | {target['target_at_least']:.0%} |"
            )
        elif key == "resident_all":
            lines.append(
                f"| secondary's memory at most, the guest writing nearly all of its own | {target['value']:.0f} MiB"
                f"{_missed(found, key)} | {target['target_at_most']:.0f} MiB |"
            )
    return lines


def _cell(found: Document, key: str, vmm: str, unit: str) -> str:
    value = found["figures"][key][vmm]
    return value if isinstance(value, str) else f"{_value(value)} {unit}"


def _value(value: Mapping[str, float]) -> str:
    return f"{_number(value['median'])} ({_number(value['most'])})"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _missed(found: Document, key: str) -> str:
    return "" if found["target"].get(key, {"met": True})["met"] else " **missed**"
