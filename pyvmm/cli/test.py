"""``pyvmm test IMAGE...``: run bare-metal test images and report, for people, as TAP or as JUnit XML."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pyvmm.errors import ConfigError
from pyvmm.machine.config import parse_size

if TYPE_CHECKING:
    from pyvmm.testing.result import Result
    from pyvmm.testing.runner import Job

DEFAULT_TIMEOUT = 90.0
SHOWN_MAX = 200
"""Bad verdicts shown of one image; the files have all."""


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "test",
        help="run bare-metal test images",
        description="Run test images that print PASS/FAIL/SKIP lines and end with a status by debug-exit (what"
        " kvm-unit-tests' x86 images do). Status: 0 none failed, 1 some failed, 125 refused.",
    )
    add = parser.add_argument
    add("images", metavar="IMAGE", nargs="*", help="image files; with --config, names of tests or groups")
    add("--config", metavar="FILE", help="read the tests from a unittests.cfg")
    add("--tap", action="store_true", help="print TAP 14 instead of a table")
    add("--junit", metavar="FILE", help="write JUnit XML to FILE")
    add("--timeout", metavar="S", help=f"seconds that an image may take (default {DEFAULT_TIMEOUT:g})")
    add("--jobs", "-j", metavar="N", default="1", help="images run at once (default 1)")
    add("--memory", "-m", metavar="SIZE", help="guest memory (default 128M)")
    add("--smp", metavar="N", help="number of vCPUs (default 1)")
    add("--append", metavar="TEXT", help="command line of every image")
    add("--initrd", metavar="FILE", help="environ file, handed over as the one Multiboot module")
    add("--device", choices=("testdev",), action="append", default=[], help="testdev: QEMU's pc-testdev")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run all; 0 or 1."""
    jobs = _jobs(args)
    at_once = _number(args.jobs, "--jobs", 64)
    if args.junit is not None and not os.access(os.path.dirname(args.junit) or ".", os.W_OK):
        raise ConfigError(f"--junit {args.junit}: its folder does not exist or is not writable")
    from pyvmm.testing.runner import Runner

    runner = Runner()

    def ended(number: int, _frame: FrameType | None) -> None:
        runner.stop()
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, ended)
    results: list[Result] = []
    try:
        arriving = _kept(runner.run_all(jobs, at_once), results)
        if args.tap:
            _show_tap(arriving)
        else:
            _show_table(arriving, results)
    finally:
        runner.stop()
        signal.signal(signal.SIGTERM, old)
        if args.junit is not None:
            _write_junit(args.junit, results)  # of an interrupted run, too, as far as it came
    return int(any(result.failed for result in results))


def _jobs(args: argparse.Namespace) -> list[Job]:
    from pyvmm.testing.runner import Job
    from pyvmm.testing.suite_file import suite_jobs

    timeout = DEFAULT_TIMEOUT if args.timeout is None else _seconds(args.timeout)
    options: list[str] = []
    if args.memory is not None:
        options += ["--memory", str(parse_size(args.memory, "--memory"))]
    if args.smp is not None:
        options += ["--smp", str(_number(args.smp, "--smp", 64))]
    if args.append is not None:
        options.append(f"--append={args.append}")
    if args.initrd is not None:
        options.append(f"--initrd={args.initrd}")
    for device in args.device:
        options += ["--device", device]
    if args.config is not None:
        jobs = suite_jobs(Path(args.config), args.images, timeout)
        if not jobs:
            raise ConfigError(f"{args.config}: has no test to run")
        # What the command line says comes last and counts.
        return [job._replace(options=(*job.options, *options)) for job in jobs]
    if not args.images:
        raise ConfigError("pyvmm test: name images, or a --config that does")
    jobs = []
    for image in args.images:
        if not os.path.isfile(image):
            raise ConfigError(f"{image}: no such file")
        path = image if not image.startswith("-") else f"./{image}"
        jobs.append(Job(_name(image, args.images), path, tuple(options), timeout))
    return jobs


def _name(image: str, images: list[str]) -> str:
    """The file's name without suffix, or its whole path where that is not enough to tell them apart."""
    stem = Path(image).stem
    return stem if sum(Path(other).stem == stem for other in images) == 1 else image


def _kept(arriving: Iterator[Result], results: list[Result]) -> Iterator[Result]:
    for result in arriving:
        results.append(result)
        yield result


def _show_tap(arriving: Iterator[Result]) -> None:
    from pyvmm.testing.tap import tap_lines

    for line in tap_lines(arriving):
        print(line, flush=True)


def _show_table(arriving: Iterator[Result], results: list[Result]) -> None:
    """Lines as the results come, then a summary."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    for result in arriving:
        console.print(_headline(result, escape))
        bad = [case for case in result.report.cases if case.bad]
        for case in bad[:SHOWN_MAX]:
            console.print(f"    {case.verdict}: {escape(_printable(case.name))}")
        if len(bad) > SHOWN_MAX:
            console.print(f"    and {len(bad) - SHOWN_MAX} more")
        if result.failed and not bad and result.output:
            for line in result.output[-2000:].decode(errors="replace").splitlines()[-5:]:
                console.print(f"    | {escape(_printable(line))}")
        for note in result.notes:
            console.print(f"    note: {escape(_printable(note))}")
    if console.is_terminal and len(results) > 1:
        table = Table("image", "verdict", "tests", "failed", "skipped", "seconds")
        for result in results:
            table.add_row(*_row(result, escape))
        console.print(table)
    console.print(_conclusion(results))


def _headline(result: Result, escape: Any) -> str:
    from pyvmm.testing.result import NAMES

    colour = "red" if result.failed else "yellow" if result.outcome == "skip" else "green"
    count = f" ({len(result.report.cases)} tests)" if result.report.cases else ""
    why = f": {_printable(result.reason)}" if result.reason and result.reason != "skipped" else ""
    rest = escape(f"{_printable(result.name)}{count}{why}")
    return f"[{colour}]{NAMES[result.outcome]}[/{colour}] {rest} [dim]{result.seconds:.1f} s[/dim]"


def _row(result: Result, escape: Any) -> tuple[str, ...]:
    cases = result.report.cases
    bad, skipped = sum(case.bad for case in cases), sum(case.verdict == "SKIP" for case in cases)
    return (
        escape(_printable(result.name)), result.outcome, str(len(cases)), str(bad), str(skipped),
        f"{result.seconds:.1f}",
    )  # fmt: skip


def _conclusion(results: list[Result]) -> str:
    passed = sum(result.outcome == "pass" for result in results)
    failed = sum(result.failed for result in results)
    skipped = sum(result.outcome == "skip" for result in results)
    cases = sum(len(result.report.cases) for result in results)
    return f"{len(results)} images: {passed} passed, {failed} failed, {skipped} skipped; {cases} tests in them"


def _write_junit(path: str, results: list[Result]) -> None:
    from pyvmm.testing.junit import junit_document

    try:
        with open(path, "wb") as file:
            file.write(junit_document(results))
    except OSError as error:
        raise ConfigError(f"--junit {path}: {error.strerror}") from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ConfigError(f"--timeout {text!r}: write a positive number of seconds")
    return value


def _number(text: str, what: str, maximum: int) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= maximum:
        raise ConfigError(f"{what} {text!r}: write a number from 1 to {maximum}")
    return int(text)


def _printable(text: str) -> str:
    """A guest's text without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text[:500])
