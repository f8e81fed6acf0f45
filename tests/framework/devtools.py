"""Debian's Chromium without a screen, driven as its own tools do: the DevTools protocol, over two pipes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.framework.browser import chromium
from tests.framework.topology import Namespace

START_DEADLINE = 30.0
ANSWER_DEADLINE = 15.0


class Browser:
    """One page. What goes wrong in it is kept in ``problems``."""

    def __init__(self, folder: Path, inside: Namespace | None = None) -> None:
        self.problems: list[str] = []
        self._number = 0
        self._buffer = b""
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4: out of the way of those, first.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 100) for fd in (theirs_in, theirs_out)]

        def place() -> None:
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        command = [
            chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
            "--disable-extensions", "--disable-component-update", "--disable-background-networking",
            f"--user-data-dir={folder}/profile", "--window-size=1300,1400", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            inside.command(*command) if inside is not None else command, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, start_new_session=True,
            preexec_fn=place,  # noqa: PLW1509
        )  # fmt: skip
        for fd in (theirs_in, theirs_out, *ends):
            os.close(fd)
        self._session: str | None = None
        deadline = time.monotonic() + START_DEADLINE
        while not (pages := [one for one in self._targets() if one["type"] == "page"]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _targets(self) -> list[dict[str, Any]]:
        return list(self.call("Target.getTargets", seconds=START_DEADLINE)["targetInfos"])

    def close(self) -> None:
        """End it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, *, seconds: float = ANSWER_DEADLINE, **parameters: Any) -> dict[str, Any]:
        """The result of ``method``."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + seconds
        while True:
            answer = self._message(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return dict(answer["result"])
            self._note(answer)

    def open(self, url: str) -> None:
        """Go there."""
        found = self.call("Page.navigate", url=url)
        assert "errorText" not in found, found
        self.wait(f"document.readyState === 'complete' && location.href === {json.dumps(url)}")

    def see(self, expression: str) -> Any:
        """The value of ``expression`` in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 20) -> Any:
        """The value of ``expression`` once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.see(expression)):
            assert time.monotonic() < deadline, (expression, self.problems, self.see("document.body.innerText"))
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """With a mouse, in the middle of what ``selector`` names."""
        place = self.see(f"""(() => {{
            const found = document.querySelector({json.dumps(selector)});
            found.scrollIntoView({{ block: "center" }});
            const box = found.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def picture(self, file: Path) -> None:
        """A PNG of the whole page."""
        import base64

        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def _note(self, event: dict[str, Any]) -> None:
        said = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(said["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{said['entry'].get('url')}: {said['entry']['text']}")

    def _message(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self._in, 1 << 16) if ready else b""
            assert piece, "the browser does not answer"
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(line))


@contextlib.contextmanager
def browsing(folder: Path, inside: Namespace | None = None) -> Iterator[Browser]:
    """A browser that ends with the block."""
    browser = Browser(folder, inside)
    try:
        yield browser
    finally:
        browser.close()
