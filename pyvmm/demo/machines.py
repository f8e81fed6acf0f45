"""The pyvmm processes of the demo: each in its host's namespace, its output in a file, dead when the demo is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyvmm.demo.topology import Host
from pyvmm.errors import DeadlineError, HostError, PyvmmError
from pyvmm.qmp.client import QmpClient, open_client

LOOK = 0.02
START_DEADLINE = 60.0
QUIT_DEADLINE = 15.0
ALONE_DEADLINE = 60.0
PROTECT_DEADLINE = 120.0
LAST_WORDS = 400
FOLDER_PREFIX = "pyvmm-demo-"


class Vm:
    """A ``pyvmm run`` or ``pyvmm linux`` in ``host``. HostError: it has ended, with its last words."""

    def __init__(self, name: str, host: Host, words: tuple[str, ...], folder: Path) -> None:
        self.name, self.host = name, host
        self.full_name = f"{name}-{os.getpid()}"
        """What ``pyvmm list`` calls it."""
        self.log = folder / f"{name}.log"
        command = host.space.command(
            # The kernel ends it with this process: so not even a SIGKILL of the demo leaves a guest behind.
            "setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-m", "pyvmm", *words, "--name", self.full_name,
        )  # fmt: skip
        with open(self.log, "wb") as output:
            # A session of its own: Ctrl-C is the demo's, which ends its machines in order.
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._client: QmpClient | None = None

    def connect(self, seconds: float = START_DEADLINE) -> QmpClient:
        """A new client of its monitor; it may still be starting."""
        until = time.monotonic() + seconds
        while True:
            self.check_alive()
            try:
                return open_client(self.full_name)
            except PyvmmError:
                if time.monotonic() > until:
                    raise DeadlineError(f"{self.name} does not answer within {seconds:g} s{self._words()}") from None
                time.sleep(LOOK)

    def ask(self, command: str, arguments: dict[str, Any] | None = None, *, oob: bool = False) -> Any:
        """Have a QMP command carried out."""
        if self._client is None:
            self._client = self.connect()
        return self._client.execute(command, arguments, oob=oob)

    def colo(self) -> dict[str, Any]:
        """query-colo-status."""
        status = self.ask("query-colo-status", oob=True)
        assert isinstance(status, dict)
        return status

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float) -> None:
        """DeadlineError, HostError."""
        until = time.monotonic() + seconds
        while not condition():
            self.check_alive()
            if time.monotonic() > until:
                raise DeadlineError(f"{self.name}: {what}: not within {seconds:g} s{self._words()}")
            time.sleep(LOOK)

    def failovers(self) -> int:
        """How often it has won a guest."""
        return int(self.ask("query-colo-stats", oob=True)["failovers"])

    def is_alone(self, before: int) -> bool:
        """It has won the guest, as it had ``before`` times, and has no other side.

        A loser has none either, and its guest is one that runs, in the moment before it ends.
        """
        won = self.colo()["mode"] == "none" and self.failovers() > before
        return bool(won and self.ask("query-status", oob=True)["status"] == "running")

    def protect(self, secondary: Vm, *, mode: str, tls_creds: Path) -> None:
        """Have this machine's guest protected by ``secondary``, which waits. HostError says why it is not."""
        self.ask("migrate-set-parameters", {"x-colo-mode": mode, "tls-creds": str(tls_creds)})
        self.ask("x-colo-protect", {"uri": secondary.host.replication_uri})

        def protected() -> bool:
            status = self.colo()
            if status["mode"] == "primary" and status["x-epoch"]:
                return True
            info = self.ask("query-migrate", oob=True)
            if info.get("status") in ("failed", "cancelled", "completed"):
                why = info.get("error-desc") or status.get("x-problem") or info["status"]
                raise HostError(f"{self.name} is not protected by {secondary.name}: {why}")
            return False

        self.wait_for(protected, "protection", PROTECT_DEADLINE)

    def check_alive(self) -> None:
        """HostError."""
        status = self.process.poll()
        if status is not None:
            raise HostError(f"{self.name} has ended with status {status}{self._words()}")

    def _words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace")[-LAST_WORDS:].strip().splitlines()
            return "; its last words: " + " | ".join(line.strip() for line in lines[-4:]) if lines else ""
        return ""

    def wait_end(self, seconds: float) -> None:
        """It is to end by itself. DeadlineError says what it does instead."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            try:
                state = self.ask("query-status", oob=True)["status"], self.colo()
            except PyvmmError as error:
                state = str(error), {}
            raise DeadlineError(f"{self.name} has not ended within {seconds:g} s: {state}{self._words()}") from None

    def kill(self) -> float:
        """SIGKILL, and wait for its end; when it was sent (time.monotonic())."""
        at = time.monotonic()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(QUIT_DEADLINE)
        self.close()
        return at

    def quit(self) -> None:
        """In order, if it can; else by SIGKILL."""
        if self.process.poll() is None:
            with contextlib.suppress(PyvmmError):
                self.ask("quit")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(QUIT_DEADLINE)
        self.close()

    def close(self) -> None:
        """Nothing is left of it. Harmless twice."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(QUIT_DEADLINE)


@contextlib.contextmanager
def run_folder() -> Iterator[Path]:
    """A folder for one run, removed at its end; and those removed whose demo was killed.

    The lock on the folder says that its demo lives: the kernel gives it back, whatever that dies of.
    """
    base = Path(tempfile.gettempdir())
    for left in base.glob(f"{FOLDER_PREFIX}*"):
        _reclaim(left)
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=base))
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


def _reclaim(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if os.fstat(fd).st_uid == os.geteuid() and time.time() - os.fstat(fd).st_mtime > 1:  # one is made, then locked
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)
