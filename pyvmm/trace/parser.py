"""Parser of ``trace-events`` files (QEMU's format, docs/devel/tracing: "Declaring trace events").

One event a line: ``name(type arg, type arg) "format"``; ``#`` starts a comment line. The format is C's
printf format, with the ``PRIx64`` family of macros written between string pieces.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from pyvmm.errors import ConfigError

_LINE = re.compile(r'^(?P<name>[a-z_][a-z0-9_]*)\((?P<args>[^()]*)\)\s+(?P<format>".*)$')
_PIECE = re.compile(r'\s*(?:"(?P<text>(?:[^"\\]|\\.)*)"|PRI(?P<macro>[dioxXu])(?:8|16|32|64|PTR|MAX))')
_CONVERSION = re.compile(
    r"%(?:(?P<percent>%)|(?P<flags>[-+ #0]*\d*(?:\.\d+)?)(?:hh|h|ll|l|z|j|t)?(?P<kind>[diouxXscp]))"
)
_ESCAPES = {r"\"": '"', r"\\": "\\", r"\t": "\t"}


class EventDeclaration(NamedTuple):
    """A declared event: its name, its (type, name) arguments, and its format for Python's ``%`` operator.

    ``conversions`` holds one letter per argument (``d``, ``x``, ``s`` ...), as in the format.
    """

    name: str
    args: tuple[tuple[str, str], ...]
    format: str
    conversions: str


def parse_trace_events(path: Path) -> list[EventDeclaration]:
    """All events declared in ``path``; ConfigError names the file and line of a malformed or repeated one."""
    events: dict[str, EventDeclaration] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        declaration = parse_declaration(line, f"{path}:{number}")
        if declaration.name in events:
            raise ConfigError(f"{path}:{number}: trace event {declaration.name!r} is declared twice")
        events[declaration.name] = declaration
    return list(events.values())


def parse_declaration(line: str, where: str) -> EventDeclaration:
    """One line of a ``trace-events`` file; ``where`` is named in the ConfigError if it is malformed."""
    match = _LINE.match(line.rstrip())
    if match is None:
        raise ConfigError(f"{where}: not a trace event declaration: {line!r}")
    args: list[tuple[str, str]] = []
    text = match["args"].strip()
    if text not in ("", "void"):
        for piece in text.split(","):
            kind, _, name = piece.strip().rpartition(" ")
            while name.startswith("*"):
                kind, name = kind + " *", name[1:]
            if not kind or not name.isidentifier():
                raise ConfigError(f"{where}: argument {piece.strip()!r} is not a type and a name")
            args.append((kind.strip(), name))
    pattern, conversions = _python_format(match["format"], where)
    if len(conversions) != len(args):
        raise ConfigError(f"{where}: {len(args)} arguments but {len(conversions)} conversions in the format")
    if len({name for _, name in args}) != len(args):
        raise ConfigError(f"{where}: two arguments have the same name")
    return EventDeclaration(match["name"], tuple(args), pattern, conversions)


def _python_format(text: str, where: str) -> tuple[str, str]:
    """C's format with the ``PRI*`` macros spelled out, usable with Python's ``%``; and its conversion letters."""
    joined = ""
    at = 0
    while at < len(text):
        piece = _PIECE.match(text, at)
        if piece is None:
            raise ConfigError(f"{where}: cannot read the format from {text[at:]!r} on")
        joined += piece["macro"] or re.sub(r"\\.", _unescape, piece["text"] or "")
        at = piece.end()
    result, conversions, at = "", "", 0
    while (percent := joined.find("%", at)) >= 0:
        match = _CONVERSION.match(joined, percent)
        if match is None:
            raise ConfigError(f"{where}: cannot read the conversion at {joined[percent:]!r}")
        result += joined[at:percent]
        if match["percent"]:
            result += "%%"
        else:
            kind = match["kind"]
            conversions += kind
            result += "%#x" if kind == "p" else f"%{match['flags']}{kind}"
        at = match.end()
    return result + joined[at:], conversions


def _unescape(match: re.Match[str]) -> str:
    return _ESCAPES.get(match[0], match[0])
