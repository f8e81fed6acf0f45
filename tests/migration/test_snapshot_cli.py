"""``pyvmm snapshot`` as a user meets it: real processes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pyvmm.qmp.client import open_client
from tests.framework.processes import REPOSITORY, Running, pyvmm, refused

DIRTIER = str(REPOSITORY / "guests" / "dirtier")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PYVMM_SNAPSHOTS", str(tmp_path / "kept"))




def test_save_list_info_load_delete(tmp_path: Path) -> None:
    with Running("run", DIRTIER, "--append", "rounds=0 period=50", "--name", "first", "--timeout", "60") as first:
        first.read_until(b"round 3:")
        saved = pyvmm("snapshot", "save", "first", "here", "--description", "in the third round")
        assert (saved.returncode, saved.stderr) == (0, b"")
        first.read_until(b"round 6:")  # it goes on
        again = pyvmm("snapshot", "save", "first", "here")  # replaces it
        assert again.returncode == 0
        assert pyvmm("quit", "first").returncode == 0
        first.finish()
    facts = json.loads(pyvmm("snapshot", "info", "here", "--verify", "--json").stdout)
    assert facts["machine"] == "first" and facts["memory_mib"] == 32 and "cpu-0 v1" in facts["sections"]
    assert facts["path"] == str(tmp_path / "kept" / "here.pvsnap")
    assert b"here" in pyvmm("snapshot", "list").stdout
    with Running("snapshot", "load", "here", "--name", "second", "--timeout", "60", "--verify") as second:
        assert b"rounds" not in second.read_until(b"\r\n"), "it began anew"
        assert b"round" in second.read_until(b"\r\n")
        pyvmm("quit", "second")
        second.finish()
    assert pyvmm("snapshot", "delete", "here").returncode == 0
    assert os.listdir(tmp_path / "kept") == []
    assert "No such file" in refused("snapshot", "load", "here")


def test_a_running_machine_goes_back_by_qmp(tmp_path: Path) -> None:
    with Running("run", DIRTIER, "--append", "rounds=0 period=50", "--name", "vm", "--timeout", "60") as running:
        running.read_until(b"round 2:")
        with open_client("vm") as client:
            info = client.execute("snapshot-save", {"tag": "s"})
            assert info["pages"] > 10
            last = 0
            for _ in range(20):  # well past the round in which it was saved
                running.read_until(b"round ")
                last = int(running.read_until(b":")[:-1])
            began = time.monotonic()
            assert client.execute("snapshot-load", {"tag": "s"})["id"] == info["id"]
            print("snapshot-load took", time.monotonic() - began)
            assert client.execute("query-status")["status"] == "running"
            deadline = time.monotonic() + 10
            while True:  # rounds begin again where they were
                running.read_until(b"round ")
                number = int(running.read_until(b":")[:-1])
                if number < last:
                    break
                assert time.monotonic() < deadline, "the machine did not go back"
            client.execute("quit")
        running.finish()


def test_what_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "bad.pvsnap").write_bytes(b"PYVMSNAP" + bytes(100))
    assert "format: 0" in refused("snapshot", "info", "bad")
    assert "format: 0" in refused("snapshot", "load", "bad")
    assert b"unusable" in pyvmm("snapshot", "list").stdout
    assert "no running machine" in refused("snapshot", "save", "nobody", "x")
    assert "write a name" in refused("snapshot", "info", ".hidden")
    assert "no such folder" in refused("snapshot", "list", "/nonexistent")
    note = tmp_path / "note.txt"
    note.write_text("not a snapshot")
    refused("snapshot", "delete", str(note))
    assert note.exists()


def test_the_first_instruction_comes_soon(tmp_path: Path) -> None:
    """128 MiB, a cold process. The figure is for bench/state.py; here it must only not be absurd."""
    with Running("run", DIRTIER, "--append", "rounds=0", "-m", "128M", "--name", "vm", "--timeout", "60") as running:
        running.read_until(b"round 1:")
        assert pyvmm("snapshot", "save", "vm", "s").returncode == 0
        pyvmm("quit", "vm")
        running.finish()
    began = time.monotonic()
    with Running("snapshot", "load", "s", "--name", "two", "--timeout", "60") as loaded:
        loaded.read_until(b"\r\n")
        assert time.monotonic() - began < 10
        pyvmm("quit", "two")
        loaded.finish()


class _Filling:
    """What is started in it has a file system of its own at ``folder``, with ``size`` bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size

    def command(self, *words: str) -> list[str]:
        mount = 'mount -t tmpfs -o size="$0" tmpfs "$1" && shift && exec "$@"'
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, str(self.size), str(self.folder),
                *words]  # fmt: skip


def test_a_disk_that_is_full_costs_the_new_snapshot_only(tmp_path: Path) -> None:
    """The one that it was to replace is there as it was, nothing else is, and the guest goes on."""
    kept = tmp_path / "kept"
    kept.mkdir()
    guest = ("run", DIRTIER, "--append", "rounds=0 period=50 pages=600", "--name", "vm", "--timeout", "60")
    with Running(*guest, inside=_Filling(kept, 4 << 20)) as running:
        running.read_until(b"round 2:")
        there = Path(f"/proc/{running.process.pid}/root{kept}")
        assert pyvmm("snapshot", "save", "vm", "here").returncode == 0
        first = (there / "here.pvsnap").read_bytes()
        assert len(first) > 600 * 4096
        done = pyvmm("snapshot", "save", "vm", "here")
        text = done.stderr.decode()
        assert (done.returncode, text.count("\n")) == (125, 1) and "No space left on device" in text, text
        assert os.listdir(there) == ["here.pvsnap"] and (there / "here.pvsnap").read_bytes() == first
        running.read_until(b"round ")
        assert pyvmm("quit", "vm").returncode == 0
        assert running.finish()[0] == 0
