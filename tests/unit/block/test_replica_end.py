"""The end of a survivor's disk: it waits for a merge that gets on, and not for a host's disk that does not answer."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from pyvmm.block import replica_disk
from pyvmm.block.image import SECTOR
from pyvmm.block.pair_file import read_pair
from pyvmm.block.replica_disk import ReplicaDisk
from tests.framework.topology import wait_until
from tests.unit.block.test_replica_disk import SIZE, made


def survivor(tmp_path: Path) -> ReplicaDisk:
    """With something to merge; its overlay ends it."""
    disk = made(tmp_path)
    disk.failover_hybrid(2)
    disk.overlay.write(0, b"n" * SECTOR)
    disk.overlay.replica = disk
    return disk


def test_a_hosts_disk_that_does_not_answer_keeps_nobody_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_disk, "END_PATIENCE", 0.3)
    disk = survivor(tmp_path)
    with disk._lock:  # as a merge has it whose system call does not return
        disk.merge_behind()
        with pytest.raises(OSError, match=r"nothing came of it for 0.3 s.*overlay=") as caught:
            disk.overlay.close()
        assert caught.value.errno == errno.ETIMEDOUT
        disk.overlay.close()  # once more waits for nothing, and takes nothing from under the thread
        assert disk.overlay.fd >= 0
        found = read_pair(disk.path)
        assert found is not None and found.state == "overlaid"
    threads = ("merge", "settle")
    wait_until(lambda: all(thread.name not in threads for thread in threading.enumerate()), "they never ended")
    assert Path(disk.path).read_bytes()[:SECTOR] == b"n" * SECTOR  # it did, after all
    assert [file.name for file in tmp_path.iterdir()] == ["disk.img"]
    disk.overlay.replica = None  # nobody uses it any more
    disk.overlay.close()
    disk.close()


def test_an_end_waits_for_a_merge_and_makes_a_plain_disk(tmp_path: Path) -> None:
    disk = survivor(tmp_path)
    disk.merge_behind()
    disk.overlay.close()
    assert disk.overlay.fd == -1 and not disk.stuck
    assert [file.name for file in tmp_path.iterdir()] == ["disk.img"]
    assert Path(disk.path).read_bytes() == b"n" * SECTOR + bytes(SIZE - SECTOR)
