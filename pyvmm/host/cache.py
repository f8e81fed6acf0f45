"""The host profile, kept on disk for as long as the host is up.

The file lies in the user's runtime directory (else in ~/.cache/pyvmm) and carries the key it was made for: boot,
pyvmm version, user, KVM's vendor module. Whatever is not exactly a profile of this key in a file of this user's
own is ignored and replaced: a cache must never be a reason not to start, nor a way to feed pyvmm findings.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import msgspec

from pyvmm import __version__
from pyvmm.host.kind import VENDOR_MODULES
from pyvmm.host.profile import HostProfile

FORMAT = 2
"""Raised whenever a probe or a field changes its meaning."""
MAX_SIZE = 1 << 20
FILE_NAME = "host-profile.json"


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key: dict[str, str]
    profile: HostProfile


def cache_key() -> dict[str, str]:
    """What a cached profile is valid for."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read(64).strip()
    except OSError:
        boot = ""
    return {
        "format": str(FORMAT),
        "boot_id": boot,
        "pyvmm": __version__,
        "uid": str(os.geteuid()),
        "modules": " ".join(name for name in VENDOR_MODULES if os.path.isdir(f"/sys/module/{name}")),
    }


def directories() -> Iterator[str]:
    """Where the file may lie, best first. Only below directories of this user: under sudo HOME may be another's."""
    uid = os.geteuid()
    for base, name in (
        (os.environ.get("XDG_RUNTIME_DIR", ""), "pyvmm"),
        (f"/run/user/{uid}", "pyvmm"),
        (os.environ.get("XDG_CACHE_HOME", ""), "pyvmm"),
        (os.path.expanduser("~"), ".cache/pyvmm"),
    ):
        if not os.path.isabs(base):
            continue
        try:
            found = os.stat(base)
        except OSError:
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == uid:
            yield os.path.join(base, name)


def read() -> HostProfile | None:
    """The cached profile of this boot, or ``None``."""
    for directory in directories():
        text = _read_own_file(os.path.join(directory, FILE_NAME))
        if text is None:
            continue
        try:
            entry = msgspec.json.decode(text, type=_Entry)
        except (msgspec.DecodeError, ValueError, RecursionError):  # ValueError: not UTF-8
            continue
        if entry.key == cache_key():
            return entry.profile
    return None


def write(profile: HostProfile) -> str | None:
    """Replace the cached profile in one step; where it went, or ``None`` if nowhere."""
    import tempfile

    text = msgspec.json.encode(_Entry(key=cache_key(), profile=profile))
    for directory in directories():
        path = os.path.join(directory, FILE_NAME)
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            fd, temporary = tempfile.mkstemp(prefix=f".{FILE_NAME}.", dir=directory)
        except OSError:
            continue
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException as error:
            os.unlink(temporary)
            if isinstance(error, OSError):
                continue
            raise
        return path
    return None


def _read_own_file(path: str) -> bytes | None:
    """Content of a regular file that is this user's and only this user's to write; ``None`` for anything else."""
    try:
        # O_NONBLOCK: opening a FIFO that lies there must not wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return None
        if found.st_size > MAX_SIZE:
            return None
        return os.read(fd, MAX_SIZE + 1)
    except OSError:
        return None
    finally:
        os.close(fd)
