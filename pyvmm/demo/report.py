"""The demo's report: one HTML file that needs nothing else, no script and no network."""

from __future__ import annotations

from html import escape
from pathlib import Path

from pyvmm.demo.outcome import Outcome
from pyvmm.demo.pictures import ROUND_AFTER, ROUND_BEFORE, timeline, topology_picture

SHOWN = 3
"""Failures that are looked at closely."""
BOOT_SHOWN = 1.5
"""Seconds before the guest is protected first; before that it only boots."""
STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --paper: #ffffff; --soft: #6b7785; --line: #dfe4ea; --bar: #b8cfe8;
  --box: #f2f5f9; --bad: #c0392b; --good: #2e8b57; --guard: #2f6fbb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --paper: #14181e; --soft: #97a3b2; --line: #2b333d;
  --bar: #2c4a6b; --box: #1d242d; --bad: #ff7566; --good: #5fcf91; --guard: #78b0f5; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1140px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.verdict { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
table { border-collapse: collapse; } td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); }
td:first-child { color: var(--soft); }
svg { width: 100%; height: auto; display: block; font: 11px system-ui, sans-serif; fill: var(--ink); }
.grid { stroke: var(--line); } .tick { fill: var(--soft); } .right { text-anchor: end; }
.middle { text-anchor: middle; }
.panel { fill: var(--soft); font-weight: 600; }
.panel, .label { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.small { fill: var(--soft); } .name { font-size: 14px; font-weight: 600; }
.bar { fill: var(--bar); } .gone { fill: var(--bad); opacity: .35; }
.checkpoint { stroke: var(--guard); stroke-width: 1.6; } .area { fill: var(--bar); }
.dots { stroke-width: 3; stroke-linecap: round; fill: none; opacity: .8; }
.mark { stroke: var(--soft); stroke-dasharray: 3 3; } .label { fill: var(--soft); }
.mark.death { stroke: var(--bad); stroke-dasharray: none; stroke-width: 1.6; } .label.death { fill: var(--bad); }
.mark.rescue { stroke: var(--good); } .label.rescue { fill: var(--good); }
.mark.protected { stroke: var(--guard); } .label.protected { fill: var(--guard); }
.box { fill: var(--box); stroke: var(--soft); } .cable { stroke: var(--soft); stroke-width: 1.5; fill: none; }
.replication { stroke-dasharray: 4 4; stroke: var(--guard); }
"""


def write_report(outcome: Outcome, folder: Path) -> Path:
    """``report.html`` in ``folder``, which is made if it is not there; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    path.write_text(page(outcome), encoding="utf-8")
    return path


def page(outcome: Outcome) -> str:
    """All of it."""
    end = max([one.at for one in outcome.marks] + [end for _, _, _, end in outcome.machines], default=outcome.began)
    whole = end - outcome.began + 0.1
    verdict = (
        '<span class="good">no connection and no acknowledged write was lost</span>' if outcome.ok
        else '<span class="bad">it did not go as it should</span>'
    )  # fmt: skip
    begin = min((one.at for one in outcome.marks if one.kind == "protected"), default=outcome.began) - outcome.began
    sections = [
        f"<h1>pyvmm colo demo</h1><p class=\"verdict\">{verdict}</p>",
        _table(outcome),
        "<h2>What happened</h2>", timeline(outcome, max(0.0, begin - BOOT_SHOWN), whole),
        *_round_failures(outcome, whole),
        "<h2>Who is connected to whom</h2>", topology_picture(outcome),
        _list("Answers that were not alike, and led to a checkpoint", outcome.differences[-20:]),
        _list("Problems", outcome.verdict.problems[:50] if outcome.verdict is not None else []),
    ]  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>pyvmm colo demo</title>'
        # An icon of its own, or a browser asks for /favicon.ico.
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body>{"".join(sections)}</body></html>\n'
    )


def _round_failures(outcome: Outcome, whole: float) -> list[str]:
    parts = []
    for one in outcome.failures[:SHOWN]:
        at = one.at - outcome.began
        title = f"Round the failure of {one.victim}, {at:.1f} s"
        picture = timeline(outcome, max(0.0, at - ROUND_BEFORE), min(whole, at + ROUND_AFTER))
        parts += [f"<h2>{escape(title)}</h2>", picture]
    return parts


def _table(outcome: Outcome) -> str:
    rows = "".join(f"<tr><td>{escape(what)}</td><td>{escape(value)}</td></tr>" for what, value in outcome.rows())
    return f"<table>{rows}</table>"


def _list(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    return f"<h2>{escape(title)}</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
