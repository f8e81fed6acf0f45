"""What the guest gets when the host's disk fails: errors put into the device's own system calls."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.framework import syscall_faults
from tests.framework.processes import REPOSITORY

SCRIPT = """
import json, sys
from pathlib import Path
from tests.unit.virtio.block_bench import *
from pyvmm.block.overlay import open_overlay
folder, requests, features, over = Path(sys.argv[1]), json.loads(sys.argv[2]), eval(sys.argv[3]), sys.argv[4]
image = disk(folder, content=b"b" * 65536)
if over:
    image.close()
    image = open_overlay(str(folder / over), image.path)
kinds = dict(read=IN, write=OUT, flush=FLUSH, zero=ZEROES, discard=DISCARD)
answers = []
with block_bench(image, start=False) as bench:
    bench.start(features)
    for kind, sector in requests:
        data = {"write": b"w" * 512, "zero": ranges((sector, 8, 0)), "discard": ranges((sector, 8, 0))}.get(kind, b"")
        answer = bench.request(kinds[kind], sector if kind in ("read", "write") else 0, data, 512 * (kind == "read"))
        answers.append([answer[0], answer[1][:2].decode()])
    lines = bench.lines
print(json.dumps([answers, lines]))
"""
OK, IOERR = 0, 1


def served(
    folder: Path, rules: list[str], *requests: tuple[str, int], features: str = "ALL", overlay: str = ""
) -> tuple[list[tuple[int, str]], list[str], list[str]]:
    """What each request got (status, first bytes read), what the user was told, and the faults that struck."""
    log = folder / "faults"
    done = subprocess.run(
        syscall_faults.command(log, rules, sys.executable, "-c", SCRIPT, str(folder), json.dumps(requests), features,
                               overlay),
        capture_output=True, text=True, timeout=90, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers, lines = json.loads(done.stdout)
    return [(status, text) for status, text in answers], lines, log.read_text().splitlines()


def test_a_read_that_fails_is_an_error_without_data_and_the_next_one_is_not(tmp_path: Path) -> None:
    answers, lines, faults = served(
        tmp_path, ["preadv2:disk.img:EIO:1:2"], *[("read", sector) for sector in range(4)]
    )  # fmt: skip
    assert answers == [(OK, "bb"), (IOERR, "\0\0"), (IOERR, "\0\0"), (OK, "bb")]
    assert faults == ["preadv2 EIO"] * 2
    assert lines == [f"disk {tmp_path}/disk.img: reads fail: Input/output error; the guest sees I/O errors"]


def test_a_write_that_fails_is_an_error_and_the_next_one_is_not(tmp_path: Path) -> None:
    answers, lines, _ = served(
        tmp_path, ["pwritev2:disk.img:EIO:1:1"], ("write", 0), ("write", 1), ("read", 1), ("write", 2), ("flush", 0)
    )
    assert answers == [(OK, ""), (IOERR, ""), (OK, "bb"), (OK, ""), (OK, "")]
    assert len(lines) == 1 and "writes fail: Input/output error" in lines[0]


def test_after_a_flush_that_failed_none_pretends_to_have_saved_what_is_lost(tmp_path: Path) -> None:
    """The kernel tells of a page that it could not write back once, and calls it clean from then on."""
    answers, lines, faults = served(
        tmp_path, ["fdatasync:disk.img:EIO:1:1"],
        ("write", 0), ("flush", 0), ("write", 1), ("flush", 0), ("write", 2), ("flush", 0), ("read", 1),
    )  # fmt: skip
    assert [status for status, _ in answers] == [OK, OK, OK, IOERR, OK, IOERR, OK]
    assert faults == ["fdatasync EIO"] and len(lines) == 1 and "flushes fail: Input/output error" in lines[0]


def test_a_driver_that_cannot_flush_sees_the_failure_at_its_write(tmp_path: Path) -> None:
    answers, _, faults = served(
        tmp_path, ["fdatasync:disk.img:EIO:1:1"], ("write", 0), ("write", 1), ("write", 2), ("read", 0),
        features="ALL & ~(blk.F_FLUSH | blk.F_CONFIG_WCE)",
    )  # fmt: skip
    assert [status for status, _ in answers] == [OK, IOERR, IOERR, OK] and faults == ["fdatasync EIO"]


def test_zeroes_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    answers, lines, _ = served(tmp_path, ["fallocate:disk.img:EIO"], ("zero", 0), ("discard", 0), ("read", 0))
    assert answers == [(IOERR, ""), (IOERR, ""), (OK, "bb")]
    assert len(lines) == 2 and "write_zeroes fail" in lines[0] and "discards fail" in lines[1]


def test_a_base_that_cannot_be_read_leaves_the_cluster_as_it_was(tmp_path: Path) -> None:
    """The first part of a cluster needs the rest of it: without that nothing may be claimed."""
    answers, _, _ = served(
        tmp_path, ["preadv2:disk.img:EIO:0:1"], ("write", 1), ("read", 0), ("read", 1), ("write", 1), ("read", 0),
        ("read", 1), overlay="over.img",
    )  # fmt: skip
    assert answers == [(IOERR, ""), (OK, "bb"), (OK, "bb"), (OK, ""), (OK, "bb"), (OK, "ww")]


@pytest.mark.parametrize(
    ("rule", "statuses"),
    [
        ("fdatasync:over.img:EIO:0:1", [IOERR, IOERR]),  # of the data: lost for good
        ("fdatasync:over.img:EIO:1:1", [IOERR, IOERR]),  # of the bitmap
        ("pwrite64:over.img:EIO:1:1", [IOERR, OK]),  # not the header's; the bitmap is still ours to try again
    ],
)
def test_an_overlay_whose_flush_failed(tmp_path: Path, rule: str, statuses: list[int]) -> None:
    answers, lines, _ = served(tmp_path, [rule], ("write", 1), ("flush", 0), ("flush", 0), overlay="over.img")
    assert [status for status, _ in answers] == [OK, *statuses]
    assert ("cannot be flushed at the end" in lines[-1]) == (statuses[-1] == IOERR), lines



HANG = """
import os, sys
from pathlib import Path
from tests.unit.virtio.block_bench import *
from pyvmm.errors import DeadlineError
with block_bench(disk(Path(sys.argv[1]))) as bench:
    for i in range(3):
        bench.offer(header(IN, 8 * i), 513, at=DATA + 4096 * i)
    bench.ring()
    bench.wait_for_empty_ring()
    start = time.monotonic()
    try:
        bench.blk.end_io(start + 0.4)
    except DeadlineError as error:
        print(f"{time.monotonic() - start:.3f} {error}", flush=True)
    os._exit(0)
"""


def test_all_threads_that_hang_have_one_deadline_together(tmp_path: Path) -> None:
    log = tmp_path / "faults"
    done = subprocess.run(
        syscall_faults.command(log, ["preadv2:disk.img:hang"], sys.executable, "-c", HANG, str(tmp_path)),
        capture_output=True, text=True, timeout=60, cwd=REPOSITORY, check=False,
    )  # fmt: skip
    assert log.read_text() == "preadv2 hang\n" * 3, done.stderr
    seconds, _, line = done.stdout.partition(" ")
    assert 0.4 <= float(seconds) < 0.4 + 0.4, done.stdout
    assert line == f"disk {tmp_path}/disk.img: a request did not end within 30 s; is the host's disk well?\n"
