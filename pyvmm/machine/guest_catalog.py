"""The catalog of teaching guests: ``guests/guests.toml``, typed and checked.

``pyvmm run guests/NAME`` and the tests read the same file, so what a guest needs and what it prints is
said once. Import this module only where a folder is to be run: a plain image needs none of it.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pyvmm.errors import ConfigError
from pyvmm.machine.config import MAX_CPUS, MAX_MEMORY, MIN_MEMORY, parse_size

CATALOG_NAME = "guests.toml"
_MAX_CATALOG_SIZE = 1 << 20
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")

_Line = Annotated[str, msgspec.Meta(max_length=200)]


class Regex(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line that matches ``regex`` as a whole."""

    regex: _Line


class AnyOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As many lines as listed, exactly these, in whatever order."""

    any_order: Annotated[tuple[_Line, ...], msgspec.Meta(min_length=1, max_length=64)]


class _Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of guests.toml, as it is written there; the file's own head explains the fields."""

    file: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\Z", max_length=64)]
    memory: str
    timeout: Annotated[float, msgspec.Meta(gt=0, le=3600)]
    teaches: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    expected: Annotated[tuple[Any, ...], msgspec.Meta(min_length=1, max_length=1000)]
    folder: str | None = None
    cpus: Annotated[int, msgspec.Meta(ge=1, le=MAX_CPUS)] = 1
    append: Annotated[str, msgspec.Meta(pattern=r"^[ -~]*\Z", max_length=2048)] = ""
    status: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0


ExpectedLine = str | Regex | AnyOrder


class GuestEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One guest: how to run it, and what it does then."""

    name: str
    image: Path
    """Absolute path of the built image (which may not be built yet)."""
    memory: str
    """As written, for ``--memory``."""
    memory_bytes: int
    cpus: int
    timeout: float
    """Seconds."""
    append: str
    status: int
    """Exit status of ``pyvmm run`` that is right for it."""
    expected: tuple[ExpectedLine, ...]
    teaches: str

    @property
    def is_variant(self) -> bool:
        """Another guest's image, run otherwise: its folder alone does not name it."""
        return self.name != self.image.parent.name


def load_catalog(path: Path) -> dict[str, GuestEntry]:
    """Every guest in the catalog at ``path``, by name, in the file's order.

    Whether an image is built is not asked. ConfigError names the file and the field that is wrong.
    """
    import tomllib

    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_CATALOG_SIZE + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if len(raw) > _MAX_CATALOG_SIZE:
        raise ConfigError(f"{path}: larger than 1 MiB, this is no catalog of guests")
    try:
        tables = tomllib.loads(raw.decode())
    except ValueError as error:  # not UTF-8, not TOML, or a number too long to convert
        raise ConfigError(f"{path}: not TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not TOML: nested too deeply") from None
    root = path.resolve().parent
    return {name: _entry(path, root, name, table) for name, table in tables.items()}


def find_guest(folder: Path) -> GuestEntry:
    """The guest that lives in ``folder``, from the catalog beside that folder; its image exists.

    ConfigError if there is no catalog, no such guest in it, or the image is not built.
    """
    folder = folder.resolve()
    catalog = folder.parent / CATALOG_NAME
    if not catalog.is_file():
        raise ConfigError(f"{folder}: a folder, and no {CATALOG_NAME} beside it says what to run there")
    entry = load_catalog(catalog).get(folder.name)
    if entry is None:
        raise ConfigError(f"{catalog}: has no guest {folder.name!r}")
    if not entry.image.is_file():
        raise ConfigError(f"{entry.image}: not built: run make guests")
    return entry


def describe_mismatch(expected: tuple[ExpectedLine, ...], output: str) -> str | None:
    """The first thing in ``output`` that is not as ``expected``, in one line; ``None`` if all is.

    Every line must be accounted for. CR before LF (guests write for raw terminals) is not part of a line.
    """
    lines = output.replace("\r\n", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    at = 0
    for item in expected:
        count = len(item.any_order) if isinstance(item, AnyOrder) else 1
        got = lines[at : at + count]
        if len(got) < count:
            return f"the output ends after {len(lines)} lines, expected next: {_wanted(item)}"
        if not _matches(item, got):
            return f"line {at + 1}: expected {_wanted(item)}, got {got if count > 1 else got[0]!r}"
        at += count
    if at < len(lines):
        return f"line {at + 1}: expected the end, got {lines[at]!r}"
    return None


def _matches(item: ExpectedLine, got: list[str]) -> bool:
    if isinstance(item, Regex):
        return re.fullmatch(item.regex, got[0]) is not None
    if isinstance(item, AnyOrder):
        return Counter(got) == Counter(item.any_order)
    return got == [item]


def _wanted(item: ExpectedLine) -> str:
    if isinstance(item, Regex):
        return f"a line like {item.regex!r}"
    if isinstance(item, AnyOrder):
        return f"in any order {list(item.any_order)}"
    return repr(item)


def _entry(path: Path, root: Path, name: str, table: object) -> GuestEntry:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{path}: [{name!r}]: a guest's name is lower-case letters, digits and '-'")
    where = f"{path}: [{name}]"
    try:
        written = msgspec.convert(table, _Written)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
    folder = name if written.folder is None else written.folder
    if not _NAME.fullmatch(folder):
        raise ConfigError(f"{where}: folder: must be the name of a folder beside the catalog, not {folder!r}")
    memory_bytes = parse_size(written.memory, f"{where}: memory")
    if not MIN_MEMORY <= memory_bytes <= MAX_MEMORY or memory_bytes % 4096:
        raise ConfigError(f"{where}: memory: must be whole 4 KiB pages between 1M and 1T")
    return GuestEntry(
        name=name,
        image=root / folder / written.file,
        memory=written.memory,
        memory_bytes=memory_bytes,
        cpus=written.cpus,
        timeout=written.timeout,
        append=written.append,
        status=written.status,
        expected=tuple(_expected(where, i, item) for i, item in enumerate(written.expected)),
        teaches=written.teaches,
    )


def _expected(where: str, index: int, item: object) -> ExpectedLine:
    """One element of ``expected``. By hand, because msgspec allows one table type in a union without tags."""
    form: Any = _Line
    if isinstance(item, dict):
        form = AnyOrder if "any_order" in item else Regex
    try:
        line: ExpectedLine = msgspec.convert(item, form)
        if isinstance(line, Regex):
            re.compile(line.regex)
    except (msgspec.ValidationError, re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{where}: expected[{index}]: {error}") from None
    return line
