"""A terminal for programs that want one, in a tmux server of its own; what is on its screen can be read."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self


class Terminal:
    """``command`` runs in it. A context manager that ends the server and all in it."""

    def __init__(self, folder: Path, command: str, *, width: int = 160, height: int = 24) -> None:
        self._socket = folder / "tmux"
        environment = {name: value for name, value in os.environ.items() if name != "TMUX"}
        self._environment = environment | {"LC_ALL": "C.UTF-8", "TERM": "xterm-256color"}
        # `; cat` keeps the screen when the command has ended.
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", str(width), "-y", str(height), "-s", "s",
                   f"{command}; echo ended $?; exec cat")  # fmt: skip

    def _tmux(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", str(self._socket), *words], env=self._environment, capture_output=True, text=True,
            timeout=10, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def screen(self) -> str:
        """The text on it."""
        return self._tmux("capture-pane", "-p", "-t", "s")

    def keys(self, *keys: str) -> None:
        """Press them: letters, or tmux's names (Enter, Escape, Down)."""
        self._tmux("send-keys", "-t", "s", *keys)

    def resize(self, width: int, height: int) -> None:
        """Another size."""
        self._tmux("resize-window", "-t", "s", "-x", str(width), "-y", str(height))

    def wait_for(self, *texts: str, without: str | None = None, seconds: float = 15) -> str:
        """The screen, once it has all of ``texts``, and not ``without``."""
        deadline = time.monotonic() + seconds
        while True:
            screen = self.screen()
            if all(text in screen for text in texts) and (without is None or without not in screen):
                return screen
            assert time.monotonic() < deadline, f"{texts}, without {without!r}, did not come, but:\n{screen}"
            time.sleep(0.05)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tmux("kill-server")
