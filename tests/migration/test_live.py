"""A guest that moves between processes while it runs, checks its own memory, and must not notice."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.framework.migrating import Side, check_rounds, dirtier, free_port
from tests.framework.processes import pyvmm

Start = Callable[..., Side]
PAGES = 400


@pytest.mark.parametrize("transport", ["unix", "tcp", "tls"])
def test_a_guest_hops_along_and_ends_as_if_it_had_stayed(start: Start, tmp_path: Path, transport: str) -> None:
    """Three hops; each destination was there before the guest began."""
    rounds, hops = 70, 3
    uris = [f"unix:{tmp_path}/{n}.sock" if transport == "unix" else f"tcp:127.0.0.1:{free_port()}" for n in range(hops)]
    further = []
    if transport == "tls":
        assert pyvmm("certs", str(tmp_path / "tls"), "--host", "127.0.0.1").returncode == 0
        further = ["--tls-creds", str(tmp_path / "tls")]
    guest = dirtier(PAGES, 50, rounds)
    there = [start(f"to-{n}", *guest, "--incoming", uri, *further) for n, uri in enumerate(uris)]
    for side in there:
        side.wait_for("inmigrate")
    sides = [start("from", *guest), *there]
    sides[0].wait_for_text(b"round 3:")
    for n, uri in enumerate(uris):
        if transport == "tls":
            sides[n].qmp.execute("migrate-set-parameters", {"tls-creds": str(tmp_path / "tls")})
        sides[n].migrate(uri)
        info = sides[n].migrated()
        assert info["status"] == "completed", info
        assert sides[n].status() == "postmigrate"
        assert info["ram"]["normal"] >= PAGES
        assert info["ram"]["remaining"] == 0
        sides[n + 1].wait_for("running")
        assert sides[n + 1].migration() == {"status": "completed"}
        sides[n + 1].wait_for_text(b"round ")  # it gets somewhere before it moves on
    status, last, problems = sides[-1].end()
    assert (status, problems) == (0, "")
    check_rounds(b"".join(side.quit() for side in sides[:-1]) + last, PAGES, rounds)


def test_the_command_line_over_a_descriptor(start: Start) -> None:
    """fd: on both sides; the source's process ends by itself, in order."""
    guest = dirtier(PAGES, 50, 40)
    near, far = socket.socketpair()
    with near, far:
        to = start("to", *guest, "--incoming", f"fd:{far.fileno()}", pass_fds=[far.fileno()])
        source = start("from", *guest)
        to.wait_for("inmigrate")
        source.wait_for_text(b"round 2:")
        from tests.framework.processes import PYVMM

        done = subprocess.run(
            [str(PYVMM), "migrate", f"unix:{source.path}", f"fd:{near.fileno()}", "--bandwidth", "500M"],
            pass_fds=[near.fileno()], capture_output=True, timeout=60, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"migrated in ") and b"rounds, the guest stood still for " in done.stdout
    status, begin, problems = source.end()
    assert (status, problems) == (0, "")
    status, rest, problems = to.end()
    assert (status, problems) == (0, "")
    check_rounds(begin + rest, PAGES, 40)


def test_compressed_and_named_with_figures_as_json(start: Start, tmp_path: Path) -> None:
    guest = dirtier(PAGES, 50, 40)
    to = start("to", *guest, "--incoming", "defer")
    source = start("from", *guest)
    to.wait_for("inmigrate")
    to.qmp.execute("migrate-incoming", {"uri": f"unix:{tmp_path}/m"})
    source.wait_for_text(b"round 2:")
    done = pyvmm("migrate", "from", f"unix:{tmp_path}/m", "--compress", "--json", "--keep")
    assert (done.returncode, done.stderr) == (0, b"")
    import json

    info = json.loads(done.stdout)
    assert info["status"] == "completed"
    assert info["ram"]["transferred"] < info["ram"]["normal-bytes"]  # a page of it holds a stamp and zeros
    rows = {row["name"]: row["status"] for row in json.loads(pyvmm("list", "--json").stdout)}
    assert rows["from"] == "postmigrate" and rows["to"] == "running"
    again = pyvmm("migrate", "from", f"unix:{tmp_path}/m")
    assert again.returncode == 125
    assert again.stderr == b"pyvmm: Can't migrate the vm that was paused due to previous migration\n"
    status, rest, _ = to.end()
    assert status == 0
    check_rounds(source.quit() + rest, PAGES, 40)


def test_a_paused_guest_stays_paused(start: Start, tmp_path: Path) -> None:
    guest = dirtier(PAGES, 50, 30)
    to = start("to", *guest, "--incoming", f"unix:{tmp_path}/m")
    source = start("from", *guest)
    source.wait_for_text(b"round 5:")
    source.qmp.execute("stop")
    to.wait_for("inmigrate")
    source.migrate(f"unix:{tmp_path}/m")
    assert source.migrated()["status"] == "completed"
    to.wait_for("paused")
    begin = source.quit()
    to.qmp.execute("cont")
    status, rest, _ = to.end()
    assert status == 0
    check_rounds(begin + rest, PAGES, 30)


def test_a_destination_that_is_to_start_paused_does(start: Start, tmp_path: Path) -> None:
    guest = dirtier(PAGES, 50, 20)
    to = start("to", *guest, "--incoming", f"unix:{tmp_path}/m", "-S")
    source = start("from", *guest)
    source.wait_for_text(b"round 2:")
    to.wait_for("inmigrate")
    source.migrate(f"unix:{tmp_path}/m")
    assert source.migrated()["status"] == "completed"
    to.wait_for("paused")
    to.qmp.execute("cont")
    begin = source.quit()
    status, rest, _ = to.end()
    assert status == 0
    check_rounds(begin + rest, PAGES, 20)


def test_a_guest_that_writes_faster_than_the_link_is_slowed_down_until_it_fits(start: Start, tmp_path: Path) -> None:
    """16 MiB every 20 ms over 40 MB/s would never end; QEMU without auto-converge does not, either."""
    guest = dirtier(4000, 20, 0)
    to = start("to", *guest, "--incoming", f"unix:{tmp_path}/m")
    source = start("from", *guest)
    source.wait_for_text(b"round 3:")
    to.wait_for("inmigrate")
    source.capabilities(auto_converge=True)
    source.migrate(
        f"unix:{tmp_path}/m", max_bandwidth=40_000_000, downtime_limit=50, cpu_throttle_initial=50,
        cpu_throttle_increment=25,
    )  # fmt: skip
    throttled = 0
    while (info := source.migration())["status"] not in ("completed", "failed"):
        throttled = max(throttled, info.get("cpu-throttle-percentage", 0))
    assert info["status"] == "completed", info
    assert throttled >= 50
    assert info["ram"]["dirty-sync-count"] >= 2
    begin = source.quit()
    to.wait_for_text(b"round ")
    seen = begin.count(b"round ")
    to.wait_for_text(b"round %d:" % (seen + 2))
    to.quit()


def test_by_dirty_rings_nothing_is_lost_or_the_migration_fails(start: Start, tmp_path: Path) -> None:
    """A KVM that shadows page tables overruns its rings, at times. The guest must not pay for that on either side."""
    guest = dirtier(3000, 20, 250)  # it is still at it when the migration is over, also where all takes longer
    to = start("to", *guest, "--incoming", f"unix:{tmp_path}/m")
    source = start("from", *guest, "--dirty-log", "ring")
    source.wait_for_text(b"round 2:")
    to.wait_for("inmigrate")
    source.migrate(f"unix:{tmp_path}/m", max_bandwidth=40_000_000, downtime_limit=300)
    info = source.migrated()
    if info["status"] == "completed":
        begin = source.quit()
        status, rest, problems = to.end()
        assert (status, problems) == (0, "")
        check_rounds(begin + rest, 3000, 250)
    else:
        assert "--dirty-log bitmap" in info["error-desc"]
        status, output, problems = source.end()
        assert (status, problems) == (0, "")
        check_rounds(output, 3000, 250)
        assert to.end()[0] == 125


def test_a_guest_that_resets_on_the_way_arrives_as_the_reset_one(start: Start, tmp_path: Path) -> None:
    """What a reset gives back to the host reads as zeros at the destination, too."""
    guest = dirtier(PAGES, 50, 30)
    to = start("to", *guest, "--incoming", f"unix:{tmp_path}/m")
    source = start("from", *guest)
    source.wait_for_text(b"round 5:")
    to.wait_for("inmigrate")
    source.migrate(f"unix:{tmp_path}/m", max_bandwidth=2_000_000, downtime_limit=2000)
    source.qmp.execute("system_reset")
    assert source.migrated()["status"] == "completed"
    begin = source.quit()
    status, rest, _ = to.end()
    assert status == 0
    whole = begin + rest
    check_rounds(whole[whole.rindex(b"%d pages every" % PAGES) :], PAGES, 30)
