"""Finding running machines by name: each listens on ``NAME.sock`` in a folder that only its user can enter.

The folder is ``$XDG_RUNTIME_DIR/pyvmm``, else ``/run/user/UID/pyvmm``, else ``/tmp/pyvmm-UID``. Sockets are reached
through the folder's descriptor (``/proc/self/fd/N/NAME.sock``): a path longer than a socket address holds works,
and nobody can put another folder in its place. Looking whether a name is free and taking it happen under the lock
of ``.lock``, or a socket that is bound but not yet listened on would pass for a dead machine's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Iterator

from pyvmm.errors import ConfigError, DeadlineError, HostError
from pyvmm.machine.unix_listener import listen_unix, remove_stale_socket
from pyvmm.qmp.endpoints import BACKLOG, Endpoint

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
CLIENTS = 16
"""At once on a control socket: somebody who watches a migration must not keep ``pyvmm list`` waiting."""
_SUFFIX = ".sock"
_SAME_NAME_MAX = 1000
_LOCK_DEADLINE = 5.0


def claim_name(name: str, *, exact: bool) -> tuple[str, Endpoint]:
    """Listen as the machine ``name``; (the name got, the endpoint).

    A name in use gets ``-2``, ``-3``... unless ``exact`` (the user chose it: ConfigError then, as for a name that no
    socket file can have). HostError: no folder can be had.
    """
    if not exact:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip(".-")[:56] or "machine"
    elif NAME.fullmatch(name) is None:
        raise ConfigError(f"--name {name}: write 1 to 64 letters, digits, '.', '_', '-', not '.' or '-' first")
    folder = open_folder(make=True)
    try:
        with _locked(folder):
            got = name
            for number in range(2, _SAME_NAME_MAX):
                if not remove_stale_socket(_address(folder, got)):
                    break
                if exact:
                    raise ConfigError(f"--name {name}: a machine of that name is running (pyvmm list); take another")
                got = f"{name}-{number}"
            listener = listen_unix(_address(folder, got), f"--name {got}", BACKLOG)
    except BaseException:
        os.close(folder)
        raise

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError), _locked(folder):
            os.unlink(got + _SUFFIX, dir_fd=folder)
        os.close(folder)

    return got, Endpoint(f"control:{got}", listener, CLIENTS, remove)


def running_names() -> list[str]:
    """Names of the machines that run now. What dead ones left is removed."""
    try:
        folder = open_folder(make=False)
    except FileNotFoundError:
        return []
    try:
        with _locked(folder):
            names = sorted(n.removesuffix(_SUFFIX) for n in os.listdir(folder) if n.endswith(_SUFFIX))
            return [name for name in names if remove_stale_socket(_address(folder, name))]
    finally:
        os.close(folder)


def connect(name: str, timeout: float) -> socket.socket:
    """A connection to the machine ``name``. ConfigError, naming those there are, if there is none."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.settimeout(timeout)
    try:
        if NAME.fullmatch(name) is None:
            raise FileNotFoundError
        folder = open_folder(make=False)
        try:
            link.connect(_address(folder, name))
        finally:
            os.close(folder)
    except (FileNotFoundError, ConnectionRefusedError):
        link.close()
        there = running_names()
        known = f"there is {', '.join(there)}" if there else "none is running"
        raise ConfigError(f"no running machine is called {name!r}; {known}") from None
    except OSError as error:
        link.close()
        raise HostError(f"machine {name}: {error.strerror or error}; is its process stopped?") from None
    except BaseException:
        link.close()
        raise
    return link


def open_folder(*, make: bool) -> int:
    """A descriptor of the folder; FileNotFoundError if there is none and none is to be made."""
    user = os.geteuid()
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{user}"
    try:
        ours = os.path.isabs(base) and os.stat(base).st_uid == user
    except OSError:
        ours = False
    path = f"{base}/pyvmm" if ours else f"/tmp/pyvmm-{user}"
    if make:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise HostError(f"{path}: {error.strerror}; set XDG_RUNTIME_DIR to a folder of yours") from None
    try:
        folder = os.open(path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise HostError(f"{path}: {error.strerror}; it must be a folder of yours") from None
    found = os.fstat(folder)
    if found.st_uid != user or stat.S_IMODE(found.st_mode) & 0o077:
        os.close(folder)
        raise HostError(f"{path}: must be yours and closed to others (chmod 700), or machines cannot be found by name")
    return folder


def _address(folder: int, name: str) -> str:
    return f"/proc/self/fd/{folder}/{name}{_SUFFIX}"


@contextlib.contextmanager
def _locked(folder: int) -> Iterator[None]:
    lock = os.open(".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=folder)
    try:
        deadline = time.monotonic() + _LOCK_DEADLINE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DeadlineError("the folder of running machines stays locked; is a pyvmm stopped?") from None
                time.sleep(0.002)
        yield
    finally:
        os.close(lock)
