"""``pyvmm top`` in a terminal (tmux), over machines that come, go and hang; and what it asks them."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.qmp.client import CommandError, open_client
from pyvmm.qmp.sampling import rates, sample
from tests.framework.pairs import pairs
from tests.framework.processes import PYVMM, REPOSITORY, Running, pyvmm, refused
from tests.framework.real_mode import COUNT_FOREVER, image
from tests.framework.tmux import Terminal

DIRTIER = str(REPOSITORY / "guests" / "dirtier")
PAGES = 400


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def machine(name: str, *arguments: str) -> Running:
    running = Running("run", *arguments, "--name", name, "--serial", "null", stdin=-3, stdout=-3)
    deadline = time.monotonic() + 20
    while name not in pyvmm("list").stdout.decode():
        assert time.monotonic() < deadline and running.process.poll() is None
    return running


@pytest.fixture
def writer() -> Iterator[Running]:
    with machine("writer", DIRTIER, "--append", f"pages={PAGES} period=50 rounds=0") as running:
        yield running


def test_the_screen(writer: Running, tmp_path: Path) -> None:
    spinner = machine("spinner", image(tmp_path, COUNT_FOREVER))
    with spinner, Terminal(tmp_path, f"{PYVMM} top --interval 0.3") as terminal:
        screen = terminal.wait_for("writer", "spinner", "running", "sorted by NAME", without="...")
        assert screen.index("spinner") < screen.index("writer")
        terminal.keys("s")
        terminal.wait_for("sorted by CPU %", "halt ")
        deadline = time.monotonic() + 10
        while True:
            screen = terminal.screen()
            busy = re.search(r"spinner +running +(\d+)", screen)
            written = re.search(r"writer .* (\d+) +32 MiB", screen)
            # A second; it writes all of them between two looks.
            if busy and written and int(busy[1]) > 50 and int(written[1]) > PAGES:
                break
            assert time.monotonic() < deadline, screen
        terminal.keys("s", "s", "Up", "Enter")  # the one that writes most is the first
        terminal.wait_for("writer: running", "vCPU 0:", "exits/s by kind: ")
        # One that hangs is said to, and keeps nobody waiting.
        os.kill(spinner.process.pid, signal.SIGSTOP)
        try:
            terminal.wait_for("not answering")
            rows, deadline = set(), time.monotonic() + 10
            while len(rows) < 3:  # what the other does is told, still
                screen = terminal.screen()
                assert "not answering" in screen and time.monotonic() < deadline, screen
                rows |= set(re.findall(r"writer +running +\d+ +\d+.*", screen))
                time.sleep(0.05)
        finally:
            os.kill(spinner.process.pid, signal.SIGCONT)
        terminal.wait_for("spinner", without="not answering")
        assert pyvmm("quit", "spinner").returncode == 0
        terminal.wait_for("writer", without="spinner ")
        terminal.resize(40, 8)
        terminal.wait_for("writer")
        terminal.resize(160, 24)
        terminal.wait_for("WRITTEN/S", "writer")
        assert pyvmm("quit", "writer").returncode == 0
        terminal.wait_for("no machine is running")
        terminal.keys("q")
        terminal.wait_for("ended 0")


def test_once(writer: Running) -> None:
    text = pyvmm("top", "--once").stdout.decode()
    assert "WRITTEN/S" in text.splitlines()[0] and "writer" in text.splitlines()[1]
    (seen,) = json.loads(pyvmm("top", "writer", "--once", "--json").stdout)
    assert seen["name"] == "writer" and seen["problem"] is None
    assert PAGES <= seen["rates"]["dirty"] * seen["rates"]["seconds"] <= PAGES + 64
    assert seen["sample"]["cpus"][0]["kinds"]["halt"] > 0
    assert pyvmm("quit", "writer").returncode == 0
    assert pyvmm("top", "--once", "--json").stdout == b"[]\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "needs a terminal"), (("nobody", "--once"), "no machine 'nobody'"), (("--json",), "--once"),
        (("--interval", "0", "--once"), "0.1 to 3600"),
    ],
)  # fmt: skip
def test_refused(options: tuple[str, ...], says: str) -> None:
    assert says in refused("top", *options)


def test_counters_by_qmp(writer: Running) -> None:
    with open_client("writer") as client:
        both = client.execute("query-stats", {"target": "vcpu"})
        assert [(each["provider"], each["qom-path"]) for each in both] == [
            ("kvm", "/machine/cpu[0]"), ("pyvmm", "/machine/cpu[0]")]  # fmt: skip
        some = client.execute(
            "query-stats", {"target": "vcpu", "providers": [{"provider": "kvm", "names": ["halt_exits"]}]}, oob=True
        )
        assert [one["name"] for one in some[0]["stats"]] == ["halt_exits"] and len(some) == 1
        kvm, own = client.execute("query-stats", {"target": "vm"})
        assert kvm["provider"] == "kvm" and own["stats"][0] == {"name": "resets", "value": 0}
        assert client.execute("query-stats", {"target": "vm", "providers": []}) == []
        # The schemas name what is told, no more and no less.
        for schema in client.execute("query-stats-schemas", oob=True):
            wanted = {"target": schema["target"], "providers": [{"provider": schema["provider"]}]}
            (told,) = client.execute("query-stats", wanted)
            assert [one["name"] for one in told["stats"]] == [one["name"] for one in schema["stats"]]
        clock = {"name": "cpu-time-ns", "type": "cumulative", "exponent": -9, "unit": "seconds", "base": 10}
        _, by_cpu = client.execute("query-stats-schemas", {"provider": "pyvmm"})
        assert by_cpu["target"] == "vcpu" and by_cpu["stats"][0] == clock
        nobody = {"target": "vcpu", "vcpus": ["/machine/cpu[7]"]}
        for bad in (nobody, {"target": "vm", "vcpus": []}, {"target": "disk"}):
            with pytest.raises(CommandError):
                client.execute("query-stats", bad)
        before = sample(client)
        time.sleep(0.3)
        found = rates(before, sample(client))
        assert found is not None and found.dirty is not None and found.exits > 0 and 0 < found.busy < 1
        assert rates(sample(client), before) is None


def test_a_pair(tmp_path: Path) -> None:
    with pairs(tmp_path) as pair:
        primary, secondary = pair.start()
        before = sample(primary.qmp)
        deadline = time.monotonic() + 20
        while True:
            primary.qmp.execute("colo-checkpoint-now")
            time.sleep(0.1)
            after = sample(primary.qmp)
            found = rates(before, after)
            # What checkpoints harvest is what is known of a protected guest's writes.
            if found is not None and found.dirty:
                break
            assert time.monotonic() < deadline
        assert after.heat is not None and after.heat["log"] == "others"
        text = pyvmm("top", "--once", "--interval", "0.1").stdout.decode()
        for side, role in ((primary, "primary"), (secondary, "secondary")):
            assert re.search(rf"^{side.name} +running .* {role} +[1-9]", text, re.M), text


def test_queues_by_qmp(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    guest = [str(REPOSITORY / "guests" / "disk-reader"), "--disk", str(disk), "--no-shutdown"]
    with machine("reader", *guest), open_client("reader") as client:
        (info,) = client.execute("x-query-virtio")
        assert info == {"path": "/machine/virtio-blk", "name": "virtio-blk"}
        deadline = time.monotonic() + 20
        where = {"path": info["path"], "queue": 0}
        while not (status := client.execute("x-query-virtio-queue-status", where, oob=True))["used-idx"]:
            assert time.monotonic() < deadline
        assert (status["x-ready"], status["vring-num"]) == (True, 256)
        while client.execute("query-status")["status"] != "shutdown":
            assert time.monotonic() < deadline
        status = client.execute("x-query-virtio-queue-status", where)
        assert (status["inuse"], status["x-depth"], status["last-avail-idx"]) == (0, 0, status["used-idx"])
        assert client.execute("x-query-virtio-depths")[0]["depths"] == [0]
        for bad in ({"path": "/machine/none", "queue": 0}, {"path": info["path"], "queue": 1}):
            with pytest.raises(CommandError):
                client.execute("x-query-virtio-queue-status", bad)
