"""Which events go where: patterns, the ``--trace`` option, and the end of it all.

Patterns are shell globs over event names (``kvm_*``); ``-PATTERN`` turns events off again. They apply in their
order, per backend, to groups that exist and to those that are imported later.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence

from pyvmm.errors import ConfigError
from pyvmm.trace.backends import Backend, LogBackend, LogFileBackend, SimpleBackend
from pyvmm.trace.chrome import ChromeBackend
from pyvmm.trace.events import TraceGroup, all_declared_events, group_events, groups_and_later_ones, registry_lock

FORMATS = ("log", "simple", "chrome")
_EVENTS_FILE_MAX = 1 << 20

_rules: dict[Backend, list[str]] = {}
_opened: dict[str, tuple[str, Backend]] = {}  # path ("" for stderr) -> format, backend


def enable(patterns: Sequence[str], backend: Backend) -> None:
    """Send the events that ``patterns`` select (see above; items may be comma lists) to ``backend``, too.

    Raises ConfigError, before anything changes, for a pattern that no declared event matches.
    """
    wanted = _checked(patterns)
    with registry_lock:
        _rules.setdefault(backend, []).extend(wanted)
        for group in groups_and_later_ones(_apply):
            _apply(group)


def disable(backend: Backend) -> None:
    """Nothing goes to ``backend`` any more. It is not closed."""
    with registry_lock:
        _rules.pop(backend, None)
        for group in groups_and_later_ones(_apply):
            _apply(group)


def enable_from_option(text: str) -> None:
    """Carry out ``--trace``: ``PATTERN[,PATTERN...][,events=FILE][,file=PATH][,format=log|simple|chrome]``.

    Without ``file=`` the log goes to stderr; with it the format is ``simple`` unless ``format=`` says otherwise.
    ``events=`` names a file with one pattern a line (``#`` starts a comment). Options with the same file share it.
    """
    options: dict[str, str] = {}
    patterns: list[str] = []
    for item in (piece.strip() for piece in text.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            patterns.append(item)
        elif key not in ("events", "file", "format"):
            raise ConfigError(f"--trace {text!r}: unknown option {key!r}; there are events=, file= and format=")
        elif not value or key in options:
            raise ConfigError(f"--trace {text!r}: {key}= must be given once, with a value")
        else:
            options[key] = value
    path = options.get("file", "")
    kind = options.get("format", "simple" if path else "log")
    if kind not in FORMATS:
        raise ConfigError(f"--trace {text!r}: unknown format {kind!r}; there are {', '.join(FORMATS)}")
    if kind != "log" and not path:
        raise ConfigError(f"--trace {text!r}: format={kind} needs file=PATH")
    if "events" in options:
        patterns += _patterns_of_file(options["events"])
    wanted = _checked(patterns)  # before the file is truncated
    with registry_lock:
        enable(wanted, _open(path, kind))


def states(pattern: str) -> dict[str, bool]:
    """Declared events that match ``pattern`` and whether anybody gets them, those of modules not imported yet, too."""
    with registry_lock:
        return {
            name: any(_selected(name, patterns) for patterns in _rules.values())
            for name in all_declared_events()
            if fnmatch.fnmatchcase(name, pattern)
        }


def switch(names: Sequence[str], on: bool) -> None:
    """Turn events on or off in every backend there is; if there is none, turn them on in a log on stderr."""
    with registry_lock:
        if on and not _rules:
            _rules[_open("", "log")] = []
        for patterns in _rules.values():
            # An older rule of the same event has no effect any more; without it the list has a bound.
            patterns[:] = [rule for rule in patterns if rule.removeprefix("-") not in names]
            patterns.extend(name if on else f"-{name}" for name in names)
        for group in groups_and_later_ones(_apply):
            _apply(group)


def close_all() -> None:
    """Turn every event off and finish every trace. Call it last; calling it twice is allowed."""
    with registry_lock:
        for backend in list(_rules):
            disable(backend)
            backend.close()
        _opened.clear()


def _checked(patterns: Sequence[str]) -> list[str]:
    wanted = [p.strip() for item in patterns for p in item.split(",") if p.strip()]
    if not wanted:
        raise ConfigError("--trace: no pattern given; name events, for example 'kvm_*'")
    names = list(all_declared_events())
    for pattern in wanted:
        bare = pattern.removeprefix("-")
        if not any(fnmatch.fnmatchcase(name, bare) for name in names):
            raise ConfigError(f"--trace: no event matches {bare!r}{_suggest(bare, names)}")
    return wanted


def _open(path: str, kind: str) -> Backend:
    key = os.path.abspath(path) if path else ""
    if key in _opened:
        opened_as, opened = _opened[key]
        if opened_as != kind:
            raise ConfigError(f"--trace: {path or 'stderr'} is already open with format={opened_as}")
        return opened
    backend: Backend
    if kind == "chrome":
        backend = ChromeBackend(path)
    elif kind == "simple":
        backend = SimpleBackend(path)
    elif path:
        backend = LogFileBackend(path)
    else:
        backend = LogBackend()
    _opened[key] = (kind, backend)
    return backend


def _patterns_of_file(path: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            data = file.read(_EVENTS_FILE_MAX + 1)
    except OSError as error:
        raise ConfigError(f"--trace events file {path}: {error.strerror}") from None
    if len(data) > _EVENTS_FILE_MAX:
        raise ConfigError(f"--trace events file {path}: more than {_EVENTS_FILE_MAX} bytes")
    lines = (line.partition("#")[0].strip() for line in data.decode("utf-8", "replace").splitlines())
    return [line for line in lines if line]


def _apply(group: TraceGroup) -> None:
    rules = list(_rules.items())
    for name, event in group_events(group).items():
        event.set_sinks(tuple(backend.record for backend, patterns in rules if _selected(name, patterns)))


def _selected(name: str, patterns: list[str]) -> bool:
    on = False
    for pattern in patterns:
        if fnmatch.fnmatchcase(name, pattern.removeprefix("-")):
            on = not pattern.startswith("-")
    return on


def _suggest(pattern: str, names: list[str]) -> str:
    import difflib  # only on this error path

    close = difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.5)
    close = close or [name for name in names if pattern.strip("*?") and pattern.strip("*?")[:4] in name][:3]
    return f"; near matches: {', '.join(close)}" if close else ""
