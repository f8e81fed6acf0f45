"""What docs/ keeps of the reference is what the code makes; a real bash completes pyvmm's words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.cli.reference import pages
from tests.framework.processes import REPOSITORY

DOCS = REPOSITORY / "docs"


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="argparse lays its help out anew with each Python")
def test_the_reference_is_what_the_code_makes() -> None:
    made = pages()
    kept = {str(path.relative_to(DOCS)): path.read_text() for path in (DOCS / "reference").rglob("*.md")}
    kept["pyvmm.1"] = (DOCS / "pyvmm.1").read_text()
    assert kept.keys() == made.keys(), "make docs"
    assert [name for name in made if made[name] != kept[name]] == [], "make docs"


def test_every_command_has_a_page() -> None:
    from pyvmm.cli import build_parser
    from pyvmm.qmp.commands import all_commands

    made = pages()
    assert {f"reference/qmp/{name}.md" for name in all_commands()} <= made.keys()
    help_text = build_parser().format_help()
    for page in (name for name in made if name.startswith("reference/cli/pyvmm-")):
        words = Path(page).stem.split("-")[1:]
        assert words[0] in help_text, page


def test_the_man_page_has_no_line_that_roff_would_take_for_a_request_of_its_own() -> None:
    requests = {line.split()[0] for line in pages()["pyvmm.1"].splitlines() if line.startswith((".", "'"))}
    assert requests == {".TH", ".SH", ".B", ".RI", ".PP", ".nf", ".fi"}


@pytest.mark.parametrize(("line", "word", "found"), [("pyvmm mig", "mig", "migrate"), ("pyvmm net u", "u", "up")])
def test_bash_completes(line: str, word: str, found: str) -> None:
    pyvmm = Path(sys.executable).with_name("pyvmm")
    script = f"""
        eval "$({pyvmm} completion bash)"
        COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}
        $(complete -p pyvmm | sed 's/.*-F \\([^ ]*\\) .*/\\1/') pyvmm '{word}' ''
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert found in done.stdout.split(), (done.stdout, done.stderr)
