"""The reference (docs/reference, docs/pyvmm.1), made of the parsers and of QMP's registry: ``python -m
pyvmm.cli.reference FOLDER``, which is ``make docs``. A test holds what is kept to what this makes.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyvmm.cli import build_parser

WIDTH = "100"
INTRODUCTION = "Made by `make docs` from the code; do not edit.\n"


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """``parser`` and all its subcommands' ones, in order."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in dict.fromkeys(action.choices.values()):
                yield from parsers(each)


def pages() -> dict[str, str]:
    """Path below docs/ -> content, of all pages."""
    before, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), WIDTH  # argparse asks for it
    try:
        found = dict(_cli_pages())
        found["pyvmm.1"] = man_page()
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
    found |= dict(_qmp_pages())
    index = ["# Reference", "", INTRODUCTION]
    for title, folder in (("Commands", "cli"), ("QMP", "qmp")):
        names = [name for name in found if name.startswith(f"reference/{folder}/")]
        index += [f"## {title}", "", *(f"- [{Path(n).stem}]({folder}/{Path(n).name})" for n in sorted(names)), ""]
    found["reference/README.md"] = "\n".join(index)
    return found


def _cli_pages() -> Iterator[tuple[str, str]]:
    for parser in parsers(build_parser()):
        name = parser.prog.replace(" ", "-")
        text = "\n".join(line.rstrip() for line in parser.format_help().splitlines())
        yield f"reference/cli/{name}.md", f"# {parser.prog}\n\n{INTRODUCTION}\n```text\n{text}\n```\n"


def _qmp_pages() -> Iterator[tuple[str, str]]:
    from pyvmm.qmp.commands import all_commands

    for name, command in sorted(all_commands().items()):
        lines = [f"# {name}", "", INTRODUCTION, inspect.getdoc(command.handler) or "", ""]
        if command.takes_arguments:
            lines += _struct("Arguments", command.arguments)
        lines += [*_returned(command.returns)]
        if command.allow_oob:
            lines += ["May be given out of band (`exec-oob`).", ""]
        if command.states is not None:
            states = ", ".join(sorted(state.value for state in command.states))
            lines += [f"Only while the machine is in one of these states: {states}.", ""]
        yield f"reference/qmp/{name}.md", "\n".join(lines).rstrip() + "\n"


def _struct(title: str, struct: type[Any]) -> list[str]:
    from pyvmm.qmp.arguments import fields_of

    lines = [f"## {title}", "", inspect.getdoc(struct) or "", "", "| member | type | |", "| --- | --- | --- |"]
    for field in fields_of(struct):
        needed = "" if field.required else "optional"
        lines.append(f"| `{field.encode_name}` | {_type(field.type)} | {needed} |")
    return [*lines, ""]


def _returned(returns: Any) -> list[str]:
    from msgspec import inspect as shape

    if returns is None or returns is type(None):
        return []
    kind = shape.type_info(returns)
    inner = kind.item_type if isinstance(kind, shape.ListType) else kind
    if isinstance(inner, shape.StructType):
        return _struct("Returns, for each" if inner is not kind else "Returns", inner.cls)
    return ["## Returns", "", _type(kind), ""]


def _type(kind: Any) -> str:
    from msgspec import inspect as shape

    from pyvmm.qmp.arguments import without_none

    kind = without_none(kind)
    if isinstance(kind, shape.ListType):
        return f"list of {_type(kind.item_type)}"
    if isinstance(kind, shape.LiteralType):
        return ", ".join(f"`{value}`" for value in kind.values)
    if isinstance(kind, shape.StructType):
        return str(kind.cls.__name__)
    return type(kind).__name__.removesuffix("Type").lower()


def man_page() -> str:
    """pyvmm(1), in roff (man(7))."""
    top = build_parser()
    lines = [
        '.TH PYVMM 1 "" "pyvmm" "User Commands"', ".SH NAME", "pyvmm \\- a small virtual machine monitor on /dev/kvm",
        ".SH SYNOPSIS", ".B pyvmm", ".RI [ options ] \\ command \\ ...",
    ]  # fmt: skip
    for parser in parsers(top):
        lines += [".SH DESCRIPTION" if parser is top else f".SH {_roff(parser.prog.upper())}"]
        lines += [_roff(parser.description or ""), ".PP", ".nf"]
        usage = parser.format_help()
        lines += [_roff(line) for line in usage.splitlines() if line.strip() != (parser.description or "")]
        lines += [".fi"]
    lines += [".SH EXIT STATUS", _roff(_exit_statuses()), ".SH SEE ALSO", "docs/README.md, a book on how it works"]
    return "\n".join(lines) + "\n"


def _exit_statuses() -> str:
    import pyvmm.cli

    text = inspect.getdoc(pyvmm.cli) or ""
    return " ".join(text.partition("Exit statuses: ")[2].split())


def _roff(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", text)


def main() -> int:
    """Write them all into the folder that is named; what is not made any more goes."""
    folder = Path(sys.argv[1])
    made = pages()
    for old in (folder / "reference").rglob("*.md"):
        if str(old.relative_to(folder)) not in made:
            old.unlink()
    for name, text in made.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
