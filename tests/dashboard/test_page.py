"""The page in a real browser, beside machines that work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.dashboards import Dashboard
from tests.framework.devtools import Browser, browsing
from tests.framework.migrating import dirtier, sides
from tests.framework.pairs import pairs, wait_alone

pytestmark = [pytest.mark.kvm, pytest.mark.guest, pytest.mark.timeout(120)]
AT = ("--dashboard", "127.0.0.1:0")
PAGES = 500
FIRST_CELL, CELLS = (8 << 20) // (256 << 10), -(-PAGES * 4096 // (256 << 10))
"""Of the dirtier's pages; a cell of 32 MiB is 256 KiB."""
WRITTEN = "[...document.querySelectorAll('#heat rect')].map((cell) => Number(cell.dataset.written))"
HOT = "[...document.querySelectorAll('#heat rect')].flatMap((cell, i) => cell.matches('.h0') ? [] : [i])"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as started:
        yield started


def test_a_machine_at_work(browser: Browser, tmp_path: Path) -> None:
    with sides(tmp_path) as start:
        side = start("worker", *dirtier(PAGES, 20, 0), *AT)
        browser.open(Dashboard(side).url)
        browser.wait("document.querySelector('#status').textContent === 'running'")
        assert browser.see("document.title") == "worker - pyvmm"
        assert browser.see("document.querySelector('#facts').textContent") == "32.0 MiB of memory"
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
        side.qmp.execute("stop")
        browser.wait("document.querySelector('#status').textContent === 'paused'")
        browser.wait("document.querySelector('#events').textContent.includes('STOP')")
        browser.wait(f"!{HOT}.length")  # it cools down
        assert browser.problems == []
        side.qmp.execute("quit")
        status, _, problems = side.finish()
        assert (status, problems) == (0, b""), problems
        browser.wait("document.querySelector('#status').textContent === 'ended'")


def test_the_button_is_pressed(browser: Browser, tmp_path: Path) -> None:
    with pairs(tmp_path, dirtier(50, 20, 0)) as pair:
        secondary = pair.secondary()
        primary = pair.primary(secondary, *AT, "--checkpoint-delay", "100", "--colo-mode", "periodic")
        shown = Dashboard(primary)
        browser.open(shown.url)
        browser.wait("document.querySelector('#protection').textContent.includes('primary, periodic')")
        browser.wait("document.querySelectorAll('#checkpoints .bar').length > 3")
        browser.wait("document.querySelector('#checkpoints-note').textContent.includes('pause: median')")
        browser.wait("document.querySelector('#reasons').textContent.includes('periodic')")
        browser.wait(f"{HOT}.length > 0")
        assert browser.see("document.querySelector('#failover').disabled")
        browser.problems.clear()

        said = "document.querySelector('#failover-said').textContent"
        press(browser, "wrong", "#yes")
        browser.wait(f"{said}.includes('not the token')")
        assert [one for one in browser.problems if "403" not in one] == []
        browser.problems.clear()
        browser.see("document.querySelector('#token').value = ''")
        press(browser, shown.token, "#no")
        time.sleep(0.3)
        assert primary.qmp.execute("query-colo-status")["mode"] == "primary"
        browser.click("#failover")
        browser.click("#yes")
        browser.wait("document.querySelector('#protection').textContent.includes('not any more: was primary')")
        assert wait_alone(primary)["reason"] == "request"
        assert "asked for" in browser.see(said)
        assert shown.token not in browser.see("document.documentElement.outerHTML + location.href")
        browser.wait("document.querySelector('#status').textContent === 'running'")
        assert browser.see("document.querySelector('#failover-box').checkVisibility()") is False
        assert browser.problems == []


def press(browser: Browser, token: str, answer: str) -> None:
    """Type the token, press the button, and say whether one is sure."""
    browser.click("#token")
    browser.type(token)
    browser.click("#failover")
    assert browser.see("document.querySelector('#sure').open")
    browser.click(answer)
    assert not browser.see("document.querySelector('#sure').open")
