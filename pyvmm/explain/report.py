"""What was told, as one HTML file: a timeline and the events. It needs no script and no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pyvmm.explain.events import KINDS, Event
from pyvmm.svg import Scale, element, time_axis

WIDTH, LEFT, LANE = 1100.0, 150.0, 26.0
TICKS_MAX = 4000
"""Marks in a lane; beyond that one would only see a bar."""
STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --paper: #fff; --soft: #6b7785; --line: #dfe4ea; --port: #2f6fbb;
  --memory: #7a4fb5; --mode: #c0392b; --interrupt: #b7791f; --step: #8a97a6; --walk: #2e8b57; --around: #d35400; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --paper: #14181e; --soft: #97a3b2; --line: #2b333d;
  --port: #78b0f5; --memory: #b795ea; --mode: #ff7566; --interrupt: #f0c05a; --walk: #5fcf91; --around: #ff9d5c; } }
body { font: 14px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1240px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
svg { width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: var(--ink); }
.grid { stroke: var(--line); } .tick { fill: var(--soft); } .middle { text-anchor: middle; }
.lane { fill: var(--soft); text-anchor: end; }
.port { stroke: var(--port); } .memory { stroke: var(--memory); } .mode { stroke: var(--mode); }
.interrupt { stroke: var(--interrupt); } .step { stroke: var(--step); } .walk { stroke: var(--walk); }
.work-around { stroke: var(--around); } .end { stroke: var(--mode); }
table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .15rem .7rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.code, td.place { font-family: ui-monospace, monospace; white-space: pre; } td.number { text-align: right; }
tr.mode td:first-child { border-left: 3px solid var(--mode); } tr.interrupt td:first-child { border-left: 3px solid
  var(--interrupt); } tr.port td:first-child { border-left: 3px solid var(--port); }
ul { margin: .1rem 0 .1rem 1.1rem; padding: 0; color: var(--soft); }
"""


def page(title: str, told: Sequence[Event], summary: Sequence[str], note: str) -> str:
    """The whole file."""
    rows = "".join(_row(number, event) for number, event in enumerate(told, 1))
    counts = "".join(f"<tr><td class=\"code\">{escape(line)}</td></tr>" for line in summary)
    kinds = "".join(f"<li><b>{escape(kind)}</b>: {escape(text)}</li>" for kind, text in KINDS.items())
    head = "<tr><th>#<th>seconds<th>cpu<th>where<th>instruction<th>what happened</tr>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>'
        f"<p>{escape(note)}</p><h2>Timeline</h2>{timeline(told)}<h2>Events</h2><table>{head}{rows}</table>"
        f"<h2>How many of each</h2><table>{counts}</table><h2>Kinds of events</h2><ul>{kinds}</ul></body></html>\n"
    )


def _row(number: int, event: Event) -> str:
    details = "".join(f"<li>{escape(text)}</li>" for text in event.details)
    return (
        f'<tr class="{escape(event.kind)}" id="e{number}"><td class="number">{number}</td>'
        f'<td class="number">{event.seconds:.4f}</td><td>{event.cpu}</td><td class="place">{escape(event.place)}</td>'
        f'<td class="code">{escape(event.instruction or "")}</td>'
        f"<td>{escape(event.what)}{f'<ul>{details}</ul>' if details else ''}</td></tr>"
    )


def timeline(told: Sequence[Event]) -> str:
    """A lane for each kind and device, a mark for each event."""
    lanes: dict[str, list[Event]] = {}
    for event in told:
        lanes.setdefault(event.device or event.kind, []).append(event)
    end = max([event.seconds for event in told], default=0.0)
    scale = Scale(0.0, max(end, 1e-3), LEFT, WIDTH - 10)
    bottom = 10 + LANE * len(lanes)
    parts = time_axis(scale, 10, bottom)
    for number, (name, events) in enumerate(lanes.items()):
        top = 10 + LANE * number
        parts.append(element("text", x=LEFT - 8, y=top + 17, class_="lane", text=name))
        for event in events[:TICKS_MAX]:
            x = scale(event.seconds)
            says = element("title", text=f"{event.seconds:.4f} s, {event.place}: {event.what}")
            parts.append(element("line", says, x1=x, y1=top + 5, x2=x, y2=top + 21, class_=event.kind))
    return element("svg", *parts, viewBox=f"0 0 {WIDTH:g} {bottom + 24:g}", role="img")
