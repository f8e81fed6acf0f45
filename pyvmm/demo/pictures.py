"""The two pictures of the demo's report: what happened when, and who is connected to whom."""

from __future__ import annotations

from pyvmm.demo.outcome import Mark, Outcome
from pyvmm.demo.topology import BRIDGE, CLIENT, GUEST, REPLICATION_PORT, TAP, Topology
from pyvmm.svg import Scale, decade_scale, dots, element, rows_for, steps, time_axis, vertical_axis

WIDTH, LEFT, RIGHT = 1100.0, 84.0, 1084.0
LETTER, ROW = 6.4, 17.0
"""Pixels of a letter of a label, and from one row of labels to the next."""
LANE, GAP = 22.0, 34.0
CHECKPOINTS, HELD, LATENCY = 110.0, 70.0, 190.0
"""Heights of the panels."""
PAUSE_LEAST, LATENCY_LEAST = 0.1, 0.1
"""Milliseconds at the foot of the panels."""
COLOURS = ("#2f6fbb", "#d9822b", "#3d9a50", "#8e5bb5", "#c2498f", "#6b7785", "#9a7b2f", "#2a9d9d")
ROUND_BEFORE, ROUND_AFTER = 1.0, 4.0
"""Seconds round the failure that the second timeline shows."""


def timeline(outcome: Outcome, begin: float, end: float) -> str:
    """Everything from ``begin`` to ``end`` (seconds of the run): machines, checkpoints, held frames, latencies."""
    time_of = Scale(begin, end, LEFT, RIGHT)
    marks = [one for one in outcome.marks if begin <= one.at - outcome.began <= end]
    places = [(time_of(one.at - outcome.began), one.text) for one in marks]
    rows = rows_for(places, LETTER, RIGHT)
    top = 10 + ROW * (max(rows, default=-1) + 1)
    parts: list[str] = []
    y = top
    for panel in (_machines, _checkpoints, _held, _latencies):
        content, y = panel(outcome, time_of, y)
        parts += content
    bottom = y - GAP + 6
    behind = time_axis(time_of, top, bottom)
    front = [_mark(one, place, row, bottom) for one, place, row in zip(marks, places, rows, strict=True)]
    height = bottom + 26
    return element(
        "svg", *behind, *parts, *front, viewBox=f"0 0 {WIDTH:g} {height:g}", role="img"
    )


def _mark(mark: Mark, place: tuple[float, str], row: int, bottom: float) -> str:
    x, text = place
    left = min(x + 4, RIGHT - len(text) * LETTER - 4)
    y = 12 + ROW * row
    return element(
        "g",
        element("line", x1=x, y1=y - 10, x2=x, y2=bottom, class_=f"mark {mark.kind}"),
        element("text", x=left, y=y, class_=f"label {mark.kind}", text=text),
    )


def _title(text: str, y: float) -> str:
    return element("text", x=LEFT, y=y - 6, class_="panel", text=text)


def _machines(outcome: Outcome, time_of: Scale, y: float) -> tuple[list[str], float]:
    y += 20
    parts = [_title("machines, and the host each is on", y)]
    for name, host, begin, end in sorted(outcome.machines, key=lambda one: one[2]):
        first, last = begin - outcome.began, end - outcome.began
        if last > time_of.low and first < time_of.high:
            x, until = time_of(first), time_of(last)
            kind = "gone" if any(one.victim == name for one in outcome.failures) else "bar"
            parts.append(element("rect", x=x, y=y, width=max(2.0, until - x), height=LANE - 6, class_=kind, rx=3))
            parts.append(element("text", x=x + 6, y=y + 12, class_="bar-text", text=f"{name} on {host}"))
        y += LANE
    return parts, y + GAP


def _checkpoints(outcome: Outcome, time_of: Scale, y: float) -> tuple[list[str], float]:
    foot = y + CHECKPOINTS
    pauses = decade_scale([one.pause for one in outcome.checkpoints], foot, y, PAUSE_LEAST, 10.0)
    parts = [_title("checkpoints: how long the guest stood still", y), *vertical_axis(pauses, LEFT, RIGHT, "ms")]
    for one in outcome.checkpoints:
        at = one.at - outcome.began
        if time_of.low <= at <= time_of.high:
            x, top = time_of(at), pauses(max(PAUSE_LEAST, one.pause))
            says = (
                f"{one.machine}, epoch {one.epoch} ({one.reason}): pause {one.pause:.2f} ms, held by the secondary"
                f" after {one.received:.1f} ms, {one.pages} pages, {one.size / 1024:.0f} KiB"
            )  # fmt: skip
            line = element("line", element("title", text=says), x1=x, y1=foot, x2=x, y2=top, class_="checkpoint")
            parts.append(line)
    return parts, foot + GAP


def _held(outcome: Outcome, time_of: Scale, y: float) -> tuple[list[str], float]:
    foot = y + HELD
    seen = sorted((one.at - outcome.began, one.frames) for one in outcome.held)
    frames = Scale(0, max([8, *(count for _, count in seen)]), foot, y)
    parts = [_title("frames of the primary that wait for the secondary's, or for a checkpoint", y)]
    parts += vertical_axis(frames, LEFT, RIGHT, "", about=3)
    inside = [(time_of(at), frames(count)) for at, count in seen if time_of.low <= at <= time_of.high]
    return [*parts, steps(inside, foot)], foot + GAP


def _latencies(outcome: Outcome, time_of: Scale, y: float) -> tuple[list[str], float]:
    foot = y + LATENCY
    times = [(one.ended - one.began) * 1000 for one in outcome.exchanges]
    latency = decade_scale(times, foot, y, LATENCY_LEAST, 100.0)
    parts = [_title("latency of each request, at its answer; a colour for each client", y)]
    parts += vertical_axis(latency, LEFT, RIGHT, "ms")
    for client in sorted({one.client for one in outcome.exchanges}):
        points = [
            (time_of(at), latency(max(LATENCY_LEAST, (one.ended - one.began) * 1000)))
            for one in outcome.exchanges
            if one.client == client and time_of.low <= (at := one.ended - outcome.began) <= time_of.high
        ]
        if points:
            parts.append(dots(points, COLOURS[(client - 1) % len(COLOURS)]))
    return parts, foot + GAP


def topology_picture(outcome: Outcome) -> str:
    """Namespaces as boxes, cables as lines."""
    parts = [
        *_box(20, 150, 190, 90, "client", [f"eth0 {CLIENT}", f"{outcome.options.clients} clients"]),
        *_box(300, 150, 170, 90, "switch", ["bridge lan", "bridge repl"]),
        *_cable(210, 195, 300, 195, ""),
    ]
    for host, y in (("primary", 20.0), ("secondary", 250.0)):
        machines = ", ".join(name for name, where, _, _ in outcome.machines if where == host)
        parts += _box(620, y, 440, 120, host, [
            f"bridge {BRIDGE}: uplink, {TAP}",
            f"{TAP} = the guest's card, {GUEST} (down while it is the secondary's)",
            f"repl {Topology.REPLICATION[host]}:{REPLICATION_PORT}, TLS",
            f"machines: {machines}",
        ])  # fmt: skip
        near = 165.0 if host == "primary" else 225.0
        parts += _cable(470, near, 620, y + 40, "uplink")
        parts.append(element("path", d=f"M470 {near + 8:g}L620 {y + 92:g}", class_="cable replication"))
    parts.append(element("text", x=478, y=199, class_="small", text="- - - replication"))
    return element("svg", *parts, viewBox="0 0 1100 390", role="img")


def _box(x: float, y: float, width: float, height: float, name: str, lines: list[str]) -> list[str]:
    texts = [element("text", x=x + 12, y=y + 46 + 18 * i, class_="small", text=line) for i, line in enumerate(lines)]
    return [
        element("rect", x=x, y=y, width=width, height=height, rx=6, class_="box"),
        element("text", x=x + 12, y=y + 24, class_="name", text=name), *texts,
    ]  # fmt: skip


def _cable(x1: float, y1: float, x2: float, y2: float, name: str) -> list[str]:
    return [
        element("path", d=f"M{x1:g} {y1:g}L{x2:g} {y2:g}", class_="cable"),
        element("text", x=(x1 + x2) / 2, y=(y1 + y2) / 2 - 8, class_="small", text=name),
    ]
