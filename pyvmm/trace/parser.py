"""Parser of ``trace-events`` files (QEMU's format, docs/devel/tracing: "Declaring trace events").

One event a line: ``name(type arg, type arg) "format"``; ``#`` starts a comment line. The format is C's
printf format, with the ``PRIx64`` family of macros written between string pieces.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import ConfigError

_LINE = re.compile(r'^(?P<name>[a-z_][a-z0-9_]*)\((?P<args>[^)]*)\)\s+(?P<format>".*)$')


@dataclass(frozen=True)
class EventDeclaration:
    """A declared event: its name, its (type, name) arguments and its printf format."""

    name: str
    args: tuple[tuple[str, str], ...]
    format: str


def parse_trace_events(path: Path) -> list[EventDeclaration]:
    """All events declared in ``path``; ConfigError names the file and line of a malformed one."""
    events = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        events.append(_parse_line(line, f"{path}:{number}"))
    return events


def _parse_line(line: str, where: str) -> EventDeclaration:
    match = _LINE.match(line)
    if match is None:
        raise ConfigError(f"{where}: not a trace event declaration: {line!r}")
    args: list[tuple[str, str]] = []
    text = match["args"].strip()
    if text not in ("", "void"):
        for piece in text.split(","):
            kind, _, name = piece.strip().rpartition(" ")
            if not kind:
                raise ConfigError(f"{where}: argument {piece!r} has no type")
            while name.startswith("*"):
                kind, name = kind + " *", name[1:]
            args.append((kind.strip(), name))
    return EventDeclaration(match["name"], tuple(args), _python_format(match["format"]))


def _python_format(text: str) -> str:
    """C's format with the ``PRI*`` macros spelled out, usable with Python's ``%``."""
    pieces = re.findall(r'"((?:[^"\\]|\\.)*)"|PRI([a-zA-Z])\d+', text)
    joined = "".join(literal if not macro else macro for literal, macro in pieces)
    joined = re.sub(r"%([-+ #0]*\d*(?:\.\d+)?)(?:hh|h|ll|l|z|j|t)?([diouxXsc])", r"%\1\2", joined)
    return joined.replace("%p", "%#x").replace(r"\"", '"')
