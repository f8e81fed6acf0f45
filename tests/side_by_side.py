"""All tests, in less time than one after the other: ``python -m tests.side_by_side``, which is ``make test``.

What only computes (unit tests, the native harnesses) goes on in the background, at the lowest priority, while the
foreground boots Linux again and again: where CPL 0 is emulated that keeps one CPU busy for minutes and waits for
nothing else. Everything that is about time runs alone, afterwards. ``pytest`` without this runs all of it in turns.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
RESULTS = TESTS.parent / "build" / "test-results"
"""Takes a JUnit file of each of the three, and what the background printed."""
COMPUTING = ("unit", "native", "test_layers.py")
BOOTING = ("linux", "guest")


@dataclass
class Part:
    """Some of the tests in a pytest of their own."""

    name: str
    what: list[str]
    in_background: bool = False

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pytest", f"--junit-xml={RESULTS / self.name}.xml", *self.what]
        print(f"{self.name}: {' '.join(self.what)}", flush=True)
        if not self.in_background:
            return subprocess.Popen(command, cwd=TESTS.parent)
        command = ["setpriv", "--pdeathsig", "TERM", "nice", "-n", "19", *command]
        command += ["-p", "no:cacheprovider"]  # the foreground has that
        with self.log.open("wb") as log:
            return subprocess.Popen(command, cwd=TESTS.parent, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def log(self) -> Path:
        return RESULTS / f"{self.name}.log"


def parts() -> list[Part]:
    """In the background, beside it, and afterwards; together they are all of tests/."""
    every = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    rest = sorted(every - set(COMPUTING) - set(BOOTING))
    groups = (("computing", COMPUTING), ("booting", BOOTING), ("rest", rest))
    return [Part(name, [f"tests/{each}" for each in group], name == "computing") for name, group in groups]


def main() -> int:
    """0 if all of them passed."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    background, beside, rest = parts()
    started = background.start()
    try:
        statuses = {beside.name: beside.start().wait()}
        statuses[background.name] = started.wait()
        print(background.log.read_text(errors="replace"), flush=True)
        print(f"{background.name} and {beside.name}: {time.monotonic() - began:.0f} s", flush=True)
        statuses[rest.name] = rest.start().wait()  # its last line is the last one, unless something failed
    except KeyboardInterrupt:
        statuses = {"interrupted": 130}
    finally:
        if started.poll() is None:
            started.terminate()
            started.wait(30)
    failed = [name for name, status in statuses.items() if status]
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
