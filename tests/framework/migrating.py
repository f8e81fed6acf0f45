"""Guests that move between real ``pyvmm`` processes."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyvmm.qmp.client import CommandError, QmpClient, open_client
from tests.framework.processes import REPOSITORY, Running

DIRTIER = REPOSITORY / "guests" / "dirtier"
START_DEADLINE = 90.0
"""Seconds for a process to answer its monitor: some are emulated, beside a guest that keeps the only CPU busy."""
_OVER = ("completed", "failed", "cancelled")


class Side(Running):
    """A ``pyvmm run`` with a monitor; what it prints is kept."""

    def __init__(
        self, folder: Path, name: str, *arguments: str, command: str = "run", timeout: float = 200, **options: Any
    ) -> None:
        self.name = name
        self.path = folder / f"{name}.qmp"
        self.output = b""
        self._client: QmpClient | None = None
        super().__init__(
            command, *arguments, "--qmp", f"unix:{self.path}", "--name", name, "--timeout", str(timeout), **options
        )

    def __exit__(self, *error: object) -> None:
        if self._client is not None:
            self._client.close()
        super().__exit__(*error)

    @property
    def qmp(self) -> QmpClient:
        """A client, made when it is first needed; the monitor may still be starting."""
        if self._client is None:
            deadline = time.monotonic() + START_DEADLINE
            while True:
                with socket.socket(socket.AF_UNIX) as probe:
                    if probe.connect_ex(str(self.path)) == 0:
                        break
                assert self.process.poll() is None, self.finish()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            self._client = open_client(f"unix:{self.path}", START_DEADLINE)
        return self._client

    def status(self) -> str:
        return str(self.qmp.execute("query-status")["status"])

    def wait_for(self, status: str, seconds: float = 30) -> None:
        """Until the run state is ``status``."""
        deadline = time.monotonic() + seconds
        while (now := self.status()) != status:
            assert time.monotonic() < deadline, f"{self.name} is {now}, not {status}"
            time.sleep(0.02)

    def wait_for_text(self, text: bytes, seconds: float = 30) -> None:
        """Until it has printed ``text``."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while text not in self.output:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            piece = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert piece, f"{self.name}: {text!r} did not come, but {self.output!r}"
            self.output += piece

    def migrate(self, uri: str, **parameters: Any) -> None:
        """Begin; ``parameters`` by QMP's names with _ for -."""
        if parameters:
            changes = {name.replace("_", "-"): value for name, value in parameters.items()}
            self.qmp.execute("migrate-set-parameters", changes)
        self.qmp.execute("migrate", {"uri": uri})

    def capabilities(self, **states: bool) -> None:
        """By QMP's names with _ for -."""
        wanted = [{"capability": name.replace("_", "-"), "state": state} for name, state in states.items()]
        self.qmp.execute("migrate-set-capabilities", {"capabilities": wanted})

    def migration(self) -> dict[str, Any]:
        """query-migrate."""
        answer = self.qmp.execute("query-migrate")
        assert isinstance(answer, dict)
        return answer

    def migrated(self, seconds: float = 60) -> dict[str, Any]:
        """query-migrate once it is over."""
        deadline = time.monotonic() + seconds
        while (info := self.migration()).get("status") not in _OVER:
            assert time.monotonic() < deadline, info
            time.sleep(0.01)
        return info

    def quit(self) -> bytes:
        """End it in order; all it printed."""
        self.qmp.execute("quit")
        status, rest, problems = self.finish()
        assert (status, problems) == (0, b"")
        self.output += rest
        return self.output

    def end(self, seconds: float = 30) -> tuple[int, bytes, str]:
        """Status, all output, standard error of one that ends by itself."""
        status, rest, problems = self.finish(seconds)
        self.output += rest
        return status, self.output, problems.decode()


@contextlib.contextmanager
def sides(folder: Path) -> Iterator[Callable[..., Side]]:
    """A factory for processes, which end with the block."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(Side(folder, *arguments, **options))


def dirtier(pages: int, period: int, rounds: int) -> tuple[str, ...]:
    """Arguments of a guest that writes ``pages`` pages each ``period`` ms; the destination may have the same."""
    return str(DIRTIER), "--append", f"pages={pages} period={period} rounds={rounds}"


def check_rounds(output: bytes, pages: int, rounds: int) -> None:
    """``output`` of all lives of a dirtier is what one that never moved prints: nothing lost, nothing twice."""
    lines = output.decode().replace("\r\n", "\n").split("\n")
    assert re.fullmatch(rf"{pages} pages every [0-9]+ ms, {rounds} rounds", lines[0]), output
    for number in range(1, rounds + 1):
        assert lines[number].startswith(f"round {number}: {pages} pages in "), (number, output)
    assert lines[rounds + 1 :] == ["done", ""], output


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


__all__ = ["DIRTIER", "CommandError", "Side", "check_rounds", "dirtier", "free_port", "sides"]
