"""The VMM's side: the dashboard's process is started before the VMM confines itself, and ends with it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator

from pyvmm.dashboard.state import COMMANDS, UNTOLD
from pyvmm.dashboard.token import new_token, read_token
from pyvmm.errors import ConfigError, HostError
from pyvmm.qmp.endpoints import Endpoint, open_endpoint

END_DEADLINE = 1.0
"""Seconds for the dashboard to end; one that does not is killed by the kernel when the VMM is gone."""
START_MAX = 4096
_KEPT_FROM = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)
"""Signals of a terminal: they are meant for the VMM."""


@contextlib.contextmanager
def dashboard(option: str, token_file: str | None, *, confined: bool, say: Callable[[str], None]) -> Iterator[Endpoint]:
    """Serve the page at ``option`` as long as the block lasts; what the machine's monitor is to serve it at.

    ConfigError: that cannot be. ``say`` tells the user where the page is, and the token if none was given.
    """
    token = new_token() if token_file is None else read_token(token_file)
    with contextlib.ExitStack() as stack:
        web = open_endpoint(_address(option), "--dashboard")
        stack.callback(web.close)
        ours, theirs = socket.socketpair()
        stack.callback(theirs.close)
        endpoint = Endpoint("dashboard", ours, 1, lambda: None, connected=True, only=COMMANDS, untold=UNTOLD)
        stack.callback(endpoint.close)
        said = "" if token_file else f" (token for its failover button: {token})"
        where = _url(web)
        child = _start(web.socket, theirs, token, _name_in(option), confined=confined)
        theirs.close()
        web.socket.close()  # when the dashboard dies browsers are to be told, not to wait for it here
        try:
            say(f"pyvmm: dashboard at {where}{said}")
            yield endpoint
        finally:
            endpoint.close()
            _wait_for(*child)


def _address(option: str) -> str:
    if option.startswith(("unix:", "tcp:")):
        return option
    if ":" not in option:
        raise ConfigError(f"--dashboard {option}: write HOST:PORT or unix:PATH")
    return f"tcp:{option}"


def _name_in(option: str) -> str | None:
    """The host by which the user calls it."""
    return None if option.startswith("unix:") else option.removeprefix("tcp:").rpartition(":")[0].strip("[]")


def _url(web: Endpoint) -> str:
    if web.socket.family == socket.AF_UNIX:
        return web.label
    host, port = web.socket.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def _start(
    listener: socket.socket, link: socket.socket, token: str, name: str | None, *, confined: bool
) -> tuple[int, int]:
    """(process ID, pidfd). Not by subprocess: that would look after its child when the sandbox does not allow it."""
    told = {"listener": listener.fileno(), "link": link.fileno(), "token": token, "name": name, "confined": confined}
    reading, writing = os.pipe()
    try:
        os.write(writing, json.dumps(told).encode())
        listener.set_inheritable(True)
        link.set_inheritable(True)
        # -P: what lies in the folder that the user is in is not this program's.
        words = [sys.executable, "-P", "-m", "pyvmm.dashboard"]
        actions = [(os.POSIX_SPAWN_DUP2, reading, 0), (os.POSIX_SPAWN_DUP2, 2, 1)]
        process = os.posix_spawn(sys.executable, words, os.environ, file_actions=actions, setsigmask=_KEPT_FROM)
        return process, os.pidfd_open(process)
    except OSError as error:
        raise HostError(f"--dashboard: cannot start its process: {error.strerror}") from None
    finally:
        listener.set_inheritable(False)
        link.set_inheritable(False)
        os.close(reading)
        os.close(writing)


def _wait_for(process: int, pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if poll.poll(END_DEADLINE * 1000):
        os.waitpid(process, os.WNOHANG)
    os.close(pidfd)
