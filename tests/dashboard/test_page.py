"""The page in a real browser, beside machines that work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.framework.dashboards import Dashboard
from tests.framework.devtools import Browser, browsing
from tests.framework.echo_client import GUEST, MAC, echo_client, echoed
from tests.framework.migrating import dirtier, sides
from tests.framework.net_commands import demo_host
from tests.framework.pairs import pairs, wait_alone
from tests.framework.processes import REPOSITORY

pytestmark = [pytest.mark.kvm, pytest.mark.guest, pytest.mark.net, pytest.mark.timeout(120)]
AT = ("--dashboard", "127.0.0.1:0")
ECHO = (str(REPOSITORY / "guests" / "net-echo"), "--append", f"ip={GUEST}", "--net", f"demo,mac={MAC}")
PAGES = 500
FIRST_CELL, CELLS = (8 << 20) // (256 << 10), -(-PAGES * 4096 // (256 << 10))
"""Of the dirtier's pages; a cell of 32 MiB is 256 KiB."""
WRITTEN = "[...document.querySelectorAll('#heat rect')].map((cell) => Number(cell.dataset.written))"
HOT = "[...document.querySelectorAll('#heat rect')].flatMap((cell, i) => cell.matches('.h0') ? [] : [i])"


def test_a_machine_at_work(tmp_path: Path) -> None:
    with browsing(tmp_path) as browser, sides(tmp_path) as start:
        side = start("worker", *dirtier(PAGES, 20, 0), *AT)
        browser.open(Dashboard(side).url)
        browser.wait("document.querySelector('#status').textContent === 'running'")
        assert browser.see("document.title") == "worker - pyvmm"
        facts = "document.querySelector('#facts').textContent"
        browser.wait(f"/^32.0 MiB of memory, [0-9,]+ pages written a second$/.test({facts})")
        browser.wait("/^0[0-9]+ %[0-9,]+halt [0-9]+/.test(document.querySelector('#cpus tbody').textContent)")
        busy = set(range(FIRST_CELL, FIRST_CELL + CELLS))
        assert browser.wait(f"{WRITTEN}.slice({FIRST_CELL}, {FIRST_CELL + CELLS}).every(Boolean)")
        hot = set(browser.see(HOT))
        assert busy <= hot and len(hot) < 2 * len(busy) < len(browser.see(WRITTEN))
        before = browser.see(WRITTEN)
        browser.wait(f"{WRITTEN}[{FIRST_CELL}] > {before[FIRST_CELL]}")
        colours = browser.see(f"""[{FIRST_CELL}, 1].map((i) =>
            getComputedStyle(document.querySelectorAll('#heat rect')[i]).fill)""")
        assert colours[0] != colours[1]
        assert browser.see("document.querySelector('#protection-card').checkVisibility()") is False
        side.qmp.execute("system_reset")
        browser.wait("document.querySelector('#events').textContent.includes('RESET')")
        side.qmp.execute("stop")
        browser.wait("document.querySelector('#status').textContent === 'paused'")
        assert not browser.see("document.querySelector('#events').textContent.includes('STOP')")
        assert browser.problems == []
        side.qmp.execute("quit")
        status, _, problems = side.finish()
        assert (status, problems) == (0, b""), problems
        browser.wait("document.querySelector('#status').textContent === 'ended'")


def test_the_button_is_pressed(tmp_path: Path) -> None:
    with (
        demo_host() as host, echo_client(host, 0.2) as client, browsing(tmp_path, host) as browser,
        pairs(tmp_path, ECHO) as pair,
    ):  # fmt: skip
        secondary = pair.secondary(inside=host)
        primary = pair.primary(secondary, *AT, "--checkpoint-delay", "100", inside=host)
        shown = Dashboard(primary)
        browser.open(shown.url)
        browser.wait("document.querySelector('#protection').textContent.includes('primary, hybrid')")
        browser.wait("document.querySelectorAll('#checkpoints .bar').length > 3")
        browser.wait("document.querySelector('#checkpoints-note').textContent.includes('pause: median')")
        browser.wait("document.querySelector('#reasons').textContent.includes('periodic')")
        for number in range(30):
            echoed(client, b"before %d" % number)
        alike = "Number(document.querySelector('#packets tbody td:nth-child(4)').textContent)"
        browser.wait(f"{alike} >= 10")
        browser.wait("document.querySelector('#queues').textContent.includes('virtio-net 0')")
        browser.wait(f"{HOT}.length > 0")
        assert browser.see("document.querySelector('#failover').disabled")
        assert browser.problems == []

        said = "document.querySelector('#failover-said').textContent"
        press(browser, "wrong", "#yes")
        browser.wait(f"{said}.includes('not the token')")
        browser.problems.clear()  # it has the answer in it
        browser.see("document.querySelector('#token').value = ''")
        press(browser, shown.token, "#no")
        assert primary.qmp.execute("query-colo-status")["mode"] == "primary"
        # In the middle of a checkpoint a unix socket tells the other side at once, which would ask the arbiter, too.
        primary.qmp.execute("migrate-set-parameters", {"x-checkpoint-delay": 60_000})
        browser.click("#failover")
        browser.click("#yes")
        browser.wait("document.querySelector('#protection').textContent.includes('not any more: was primary')")
        assert primary.process.poll() is None, (primary.finish(), secondary.finish())
        assert wait_alone(primary)["reason"] == "request"
        assert "asked for" in browser.see(said)
        assert shown.token not in browser.see("document.documentElement.outerHTML + location.href")
        browser.wait("document.querySelector('#events').textContent.includes('COLO_EXIT')")
        assert browser.see("document.querySelector('#failover-box').checkVisibility()") is False
        assert browser.problems == []
        echoed(client, b"after")


def press(browser: Browser, token: str, answer: str) -> None:
    """Type the token, press the button, and say whether one is sure."""
    browser.click("#token")
    browser.type(token)
    browser.click("#failover")
    assert browser.see("document.querySelector('#sure').open")
    browser.click(answer)
    assert not browser.see("document.querySelector('#sure').open")
