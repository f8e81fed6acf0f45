"""One guest in two processes: what becomes of it when one of them goes, and what each side says."""

from __future__ import annotations

import json
import os
import select
import signal
import time
import urllib.request
from pathlib import Path

import pytest

from tests.framework.etcd import etcd_server
from tests.framework.migrating import Side, check_rounds, dirtier, free_port
from tests.framework.pairs import (
    check_contiguous,
    check_goes_on,
    check_same_memory,
    colo_stats,
    colo_status,
    pairs,
    rounds_in,
    wait_alone,
    wait_protected,
)
from tests.framework.processes import pyvmm

MODES = {
    "hybrid": ("--colo-mode", "hybrid", "--checkpoint-delay", "100"),
    "periodic": ("--colo-mode", "periodic", "--checkpoint-delay", "40"),
}

ROUNDS = 1000 if os.environ.get("PYVMM_IN_LAB") == "1" else 60
"""Of a guest that ends: only after it is protected, which takes emulated hosts seconds."""


def more_rounds(side: Side, count: int = 5) -> None:
    """Until ``side`` has printed ``count`` further rounds: its guest runs."""
    wanted = len(rounds_in(side.output)) + count
    deadline = time.monotonic() + 30
    assert side.process.stdout is not None
    while len(rounds_in(side.output)) < wanted:
        assert time.monotonic() < deadline, side.output[-200:]
        if select.select([side.process.stdout], [], [], 0.1)[0]:
            side.output += os.read(side.process.stdout.fileno(), 65536)


def kill(side: Side) -> bytes:
    """SIGKILL; all it ever said."""
    side.process.kill()
    side.output += side.finish()[1]
    return side.output


@pytest.mark.parametrize("mode", MODES)
def test_the_primary_is_killed(tmp_path: Path, mode: str) -> None:
    with pairs(tmp_path) as pair:
        primary, secondary = pair.start(*MODES[mode])
        wait_protected(primary, epoch=5)
        said = rounds_in(kill(primary))
        status = wait_alone(secondary)
        assert (status["last-mode"], status["reason"], status["x-failover"]) == ("secondary", "error", "completed")
        more_rounds(secondary)
        lived_on = rounds_in(secondary.quit())
        check_contiguous(said)
        check_contiguous(lived_on)
        if mode == "periodic":
            check_goes_on(said, lived_on)
        else:
            assert lived_on[0] > said[0]


@pytest.mark.parametrize("mode", MODES)
def test_the_secondary_is_killed(tmp_path: Path, mode: str) -> None:
    with pairs(tmp_path) as pair:
        primary, secondary = pair.start(*MODES[mode])
        wait_protected(primary, epoch=3)
        assert kill(secondary) == b""  # it is never heard
        status = wait_alone(primary)
        assert (status["last-mode"], status["reason"]) == ("primary", "error")
        assert primary.migrated()["status"] == "completed"
        more_rounds(primary)
        rounds = rounds_in(primary.quit())
        check_contiguous(rounds)
        assert rounds[0] == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_guest_that_ends_is_over_on_both_sides(tmp_path: Path, mode: str) -> None:
    with pairs(tmp_path, dirtier(20, 10, ROUNDS)) as pair:
        primary, secondary = pair.start(*MODES[mode])
        code, output, problems = primary.end(100)
        assert (code, problems) == (0, "")
        check_rounds(output, 20, ROUNDS)
        code, output, problems = secondary.end()
        assert (code, output) == (0, b"")
        assert problems == ""


@pytest.mark.parametrize("told", ["primary", "secondary"])
def test_told_that_the_other_side_is_gone_while_it_is_not(tmp_path: Path, told: str) -> None:
    with pairs(tmp_path) as pair:
        primary, secondary = pair.start(*MODES["periodic"])
        one, other = (primary, secondary) if told == "primary" else (secondary, primary)
        one.qmp.execute("x-colo-lost-heartbeat")
        status = wait_alone(one)
        assert (status["last-mode"], status["reason"], status["x-term"]) == (told, "request", 2)
        code, said, problems = other.end()
        assert code == 125
        assert "the other side owns the guest since term 2" in problems
        assert problems.count("\n") == 1
        more_rounds(one)
        rounds = rounds_in(one.quit())
        check_contiguous(rounds)
        if told == "secondary":
            check_goes_on(rounds_in(said), rounds)  # the loser said nothing that the winner does not know of


def test_etcd_decides(tmp_path: Path) -> None:
    with etcd_server(tmp_path) as etcd, pairs(tmp_path, arbiter=f"etcd:{etcd.address}") as pair:
        primary, secondary = pair.start(*MODES["periodic"])
        kill(primary)
        assert wait_alone(secondary)["x-term"] == 2
        more_rounds(secondary)
        secondary.quit()


def test_a_primary_that_was_only_stopped_finds_that_it_has_lost(tmp_path: Path) -> None:
    with pairs(tmp_path) as pair:
        primary, secondary = pair.start(*MODES["periodic"], "--heartbeat", "50", "--heartbeat-loss", "4")
        primary.process.send_signal(signal.SIGSTOP)
        assert wait_alone(secondary)["x-problem"]
        more_rounds(secondary)
        primary.process.send_signal(signal.SIGCONT)
        code, said, problems = primary.end()
        assert code == 125
        assert "the other side owns the guest since term 2" in problems
        lived_on = rounds_in(secondary.quit())
        check_goes_on(rounds_in(said), lived_on)


def test_protected_again_and_again(tmp_path: Path) -> None:
    with pairs(tmp_path) as pair:
        survivor, secondary = pair.start(*MODES["periodic"])
        said: list[int] = []
        for turn in range(1, 5):
            said += rounds_in(kill(survivor))
            survivor = secondary
            wait_alone(survivor)
            secondary = pair.secondary()
            mode = "periodic" if turn % 2 else "hybrid"
            survivor.qmp.execute("migrate-set-parameters", {"x-colo-mode": mode, "x-checkpoint-delay": 40})
            done = pyvmm("colo", "protect", survivor.name, "--to", pair.uri_of(secondary.name))
            assert done.returncode == 0, done.stderr
            assert colo_status(survivor)["x-term"] == 2 * turn + 1
            wait_protected(survivor, epoch=3)
        said += rounds_in(kill(survivor))
        wait_alone(secondary)
        more_rounds(secondary)
        assert rounds_in(secondary.quit())[0] > said[0]


def test_what_the_monitor_says(tmp_path: Path) -> None:
    with pairs(tmp_path) as pair:
        scraped = f"127.0.0.1:{free_port()}"
        primary, secondary = pair.start("--checkpoint-delay", "86400000", "--metrics", scraped)
        assert colo_status(primary)["mode"] == "primary"
        assert primary.migration()["status"] == "colo"
        theirs = colo_status(secondary)
        assert (theirs["mode"], theirs["x-epoch"], theirs["x-checkpoint-mode"]) == ("secondary", 1, "hybrid")
        done = pyvmm("colo", "checkpoint", primary.name)
        assert done.returncode == 0, done.stderr
        stats = colo_stats(primary)
        assert stats["checkpoints"] == 2
        assert {entry["reason"]: entry["count"] for entry in stats["reasons"]} == {"first": 1, "asked": 1}
        assert stats["pages"] >= 50
        assert sum(stats["pause"]["bins"]) == 2
        with urllib.request.urlopen(f"http://{scraped}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        assert 'pyvmm_colo_role{mode="hybrid",pair=' in text
        assert 'role="primary"} 1.0' in text
        assert "\npyvmm_colo_checkpoints_total 2.0\n" in text
        assert '\npyvmm_colo_pause_seconds_bucket{le="+Inf"} 2.0\n' in text
        shown = json.loads(pyvmm("colo", "status", primary.name, "--json").stdout)
        assert shown["status"]["x-epoch"] == 2
        assert b"primary" in pyvmm("colo", "top", primary.name, "--once").stdout
        assert b"asked" in pyvmm("colo", "why", primary.name).stdout
        assert pyvmm("colo", "failover", secondary.name).returncode == 0
        assert primary.end()[0] == 125
        wait_alone(secondary)
        assert b"not protected any more" in pyvmm("colo", "status", secondary.name).stdout
        secondary.quit()


def test_a_conversation_is_kept_and_judged(tmp_path: Path) -> None:
    record = tmp_path / "talk"
    with pairs(tmp_path) as pair:
        primary, _ = pair.start("--checkpoint-delay", "50", "--colo-record", str(record))
        wait_protected(primary, epoch=4)
        kill(primary)
    done = pyvmm("colo", "replay", str(record))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines[0].endswith("checkpoint-ready")
    assert sum("vmstate-loaded" in line for line in lines) >= 3
    kept = record.read_text().splitlines(keepends=True)
    record.write_text("".join([kept[0], kept[1], kept[3], *kept[4:]]))
    done = pyvmm("colo", "replay", str(record))
    assert done.returncode == 1
    assert b"checkpoint-reply of the secondary came where checkpoint-request" in done.stdout


def test_pages_are_sent_as_changes_if_that_is_wanted(tmp_path: Path) -> None:
    """Each kind of it, changed while the guest is protected."""
    with pairs(tmp_path, dirtier(700, 10, 0)) as pair:
        primary, secondary = pair.start("--checkpoint-delay", "30")
        for kind in ("xor", "off", "lz4", "xor"):
            primary.qmp.execute("migrate-set-parameters", {"x-colo-delta": kind})
            wait_protected(primary, epoch=int(colo_status(primary)["x-epoch"]) + 6)
            stats = colo_stats(primary)
            assert stats["pages"] > 50
            if kind == "off":
                assert stats["size"] > stats["pages"] * 4096 and not stats["delta-pages"], (kind, stats)
            else:
                assert stats["delta-pages"] > stats["pages"] * 0.8, (kind, stats)
                assert stats["saved"] > stats["pages"] * 3000 and stats["size"] < stats["pages"] * 1000 + 30_000
        primary.qmp.execute("stop")
        # One may be under way, the next has it all, and has been loaded when there is a third.
        wait_protected(primary, epoch=int(colo_status(primary)["x-epoch"]) + 3)
        check_same_memory(primary, secondary)
        primary.quit()
        secondary.wait_for("paused")
        secondary.quit()


def test_a_survivor_that_is_protected_again_has_its_memory_once(tmp_path: Path) -> None:
    """What it wrote over the last checkpoint covers pages of that, which nobody needs."""

    def held(side: Side) -> int:
        folder = Path(f"/proc/{side.process.pid}/fd")
        ram = {os.stat(fd).st_ino: fd for fd in folder.iterdir() if "memfd:pyvmm-ram" in os.readlink(fd)}
        return sum(os.stat(fd).st_blocks * 512 // 4096 for fd in ram.values())

    with pairs(tmp_path, dirtier(2000, 20, 0)) as pair:
        primary, survivor = pair.start("--checkpoint-delay", "100")
        wait_protected(primary, epoch=3)
        kill(primary)
        wait_alone(survivor)
        time.sleep(0.5)  # it writes all of its pages
        before = held(survivor)
        newcomer = pair.secondary()
        survivor.qmp.execute("migrate-set-parameters", {"x-checkpoint-delay": 100})
        survivor.qmp.execute("x-colo-protect", {"uri": pair.uri_of(newcomer.name)})
        wait_protected(survivor, epoch=3)
        assert held(survivor) <= before - 2000
        kill(survivor)
        wait_alone(newcomer)
        more_rounds(newcomer)  # of a guest that looks at each page before it writes it
        newcomer.quit()
        check_contiguous(rounds_in(newcomer.output))


def test_both_sides_hold_the_same_memory(tmp_path: Path) -> None:
    """The whole of it, after many checkpoints over a replica that ran and wrote by itself meanwhile."""
    with pairs(tmp_path, dirtier(700, 10, 0)) as pair:
        primary, secondary = pair.start("--checkpoint-delay", "30")
        wait_protected(primary, epoch=25)
        primary.qmp.execute("stop")
        # One may be under way, the next has it all, and has been loaded when there is a third.
        wait_protected(primary, epoch=int(colo_status(primary)["x-epoch"]) + 3)
        check_same_memory(primary, secondary)
        assert colo_stats(secondary)["rolled-back-pages"] > 100
        primary.quit()
        secondary.wait_for("paused")  # as its owner left it
        secondary.quit()
