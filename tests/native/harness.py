"""Harnesses in C around the native core: compiled with sanitizers, run, their figures read. One way for all of them."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parent.parent / "pyvmm" / "native"
MEMORY = "address,undefined"
RACES = "thread"
_SYMBOLS = {MEMORY: ("__asan_report_load", "__ubsan_handle"), RACES: ("__tsan_read",)}


def build(folder: Path, harness: str, sources: list[Path], *options: str, sanitizer: str = MEMORY) -> Path:
    """``harness`` (a file of this folder) and ``sources``, into ``folder``; it stops at the first thing found.

    Fails if the sanitizers are not in it: a harness without them would prove nothing.
    """
    program = folder / "harness"
    flags = [option for option in options if not option.startswith("-Wl,")]
    _objects()  # here: two threads that came first at once would make two, and one of them would be gone again
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(lambda source: _compiled(source, sanitizer, *flags), [HERE / harness, *sources]))
    _gcc(f"-fsanitize={sanitizer}", *map(str, objects), *options, "-o", str(program), "-lpthread")
    names = subprocess.run(["nm", "-D", str(program)], capture_output=True, text=True, timeout=30, check=True).stdout
    assert all(symbol in names for symbol in _SYMBOLS[sanitizer])
    return program


def _compiled(source: Path, sanitizer: str, *flags: str) -> Path:
    """An object file, made once for all that have the same in ``source``: most harnesses differ in one file."""
    # -Wno-tsan: it does not know fences, of which the queue has two; they only order memory of the guest's.
    command = ["-c", "-O1", "-g", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-tsan",
               f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{NATIVE}", *flags]  # fmt: skip
    key = hashlib.sha256(repr((command, source.name, source.read_bytes())).encode()).hexdigest()
    made = Path(_objects().name) / f"{key}.o"
    if not made.exists():
        _gcc(*command, str(source), "-o", f"{made}.part")
        os.rename(f"{made}.part", made)
    return made


@functools.cache
def _objects() -> tempfile.TemporaryDirectory[str]:
    """For as long as this process runs: meanwhile nobody changes a header."""
    return tempfile.TemporaryDirectory(prefix="pyvmm-harness-")


def _gcc(*arguments: str) -> None:
    compiler = shutil.which("gcc")
    assert compiler is not None, "gcc is needed (make packages)"
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def attempt(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run it to its end, whatever that is."""
    # setarch: the thread sanitizer of Debian 12's gcc does not cope with as much randomization as newer kernels do.
    return subprocess.run(
        ["setarch", "-R", str(program), *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False
    )


def run(program: Path, *arguments: object) -> dict[str, Any]:
    """The figures it prints; it must have found nothing."""
    done = attempt(program, *arguments)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures
