"""x-query-dirty-heat: counts of what a real guest writes, beside migrations and replications that need the same log."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.framework.migrating import CommandError, Side, check_rounds, dirtier, sides
from tests.framework.pairs import pairs

pytestmark = [pytest.mark.kvm, pytest.mark.guest]
FIRST = 8 << 20
"""Where the dirtier begins to write."""
PAGES = 200


def heat(side: Side) -> dict[str, Any]:
    while True:
        try:
            answer = side.qmp.execute("x-query-dirty-heat")
        except CommandError as error:  # where KVM shadows page tables, a ring has no room for what it logs at once
            assert "--dirty-log bitmap" in str(error)
        else:
            assert isinstance(answer, dict)
            return answer


def hot_until(side: Side, log: str, seconds: float = 30) -> dict[str, Any]:
    """Ask until ``log`` is whose harvests are counted and the dirtier's bucket has grown."""
    deadline = time.monotonic() + seconds
    first = heat(side)
    while True:
        now = heat(side)
        if now["log"] == log and now["since"] == first["since"] and at(now, FIRST) > at(first, FIRST):
            return now
        if now["since"] != first["since"] or now["log"] != log:
            first = now
        assert time.monotonic() < deadline, now
        time.sleep(0.05)


def at(found: dict[str, Any], address: int) -> int:
    """The count of the bucket that ``address`` is in."""
    region = next(one for one in found["regions"] if one["address"] <= address < one["address"] + one["size"])
    return int(region["written"][(address - region["address"]) // region["bucket"]])


@pytest.mark.parametrize("method", ["bitmap", "ring"])
def test_it_is_hot_where_the_guest_writes(tmp_path: Path, method: str) -> None:
    with sides(tmp_path) as start:
        side = start("one", *dirtier(PAGES, 20, 0), "--memory", "64M", "--dirty-log", method)
        side.wait_for_text(b"round 2")
        found = hot_until(side, "own")
        (region,) = found["regions"]
        assert (region["address"], region["size"], len(region["written"])) == (0, 64 << 20, 256)
        written = FIRST // region["bucket"], -(-(FIRST + PAGES * 4096) // region["bucket"])
        assert all(region["written"][slice(*written)])
        cold = region["written"][written[1] : -16]  # the dirtier's tables are at the end
        assert not any(cold), region
        assert 0 < region["written"][written[0]] <= region["bucket"] // 4096 * found["harvests"]
        if method == "bitmap":
            side.qmp.execute("calc-dirty-rate", {"calc-time": 1})  # takes the log over
            assert heat(side)["log"] == "others"
            assert hot_until(side, "own")["since"] == found["since"]
            assert side.qmp.execute("query-dirty-rate")["status"] == "measured"


def test_nobody_asks_and_nothing_is_logged(tmp_path: Path) -> None:
    with sides(tmp_path) as start:
        side = start("one", *dirtier(PAGES, 20, 0))
        side.wait_for_text(b"round 2")
        began = hot_until(side, "own")["since"]
        time.sleep(3.3)
        again = heat(side)
        assert (again["since"] > began, again["harvests"], again["log"]) == (True, 1, "own")


def test_a_migration_takes_the_log_and_loses_nothing(tmp_path: Path) -> None:
    rounds = 60
    with sides(tmp_path) as start:
        target = start("to", *dirtier(PAGES, 20, rounds), "--incoming", f"unix:{tmp_path}/m")
        assert heat(target)["log"] == "none"
        source = start("from", *dirtier(PAGES, 20, rounds))
        source.wait_for_text(b"round 2")
        hot_until(source, "own")
        source.migrate(f"unix:{tmp_path}/m", max_bandwidth=2 << 20, downtime_limit=1)
        hot_until(source, "others")
        source.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30, "downtime-limit": 1000})
        assert source.migrated()["status"] == "completed"
        output = source.quit()
        hot_until(target, "own")
        status, rest, _ = target.end()
        assert status == 0
        check_rounds(output + rest, PAGES, rounds)


def test_a_primary_tells_what_its_checkpoints_find(tmp_path: Path) -> None:
    with pairs(tmp_path, dirtier(PAGES, 20, 0)) as pair:
        primary, _ = pair.start("--colo-mode", "periodic", "--checkpoint-delay", "50")
        assert hot_until(primary, "others")["regions"]
