"""``pyvmm linux --fast``: a Linux that was booted once, kept as a snapshot for each way to boot it.

Its init says over the task port (devices/task_port.py) that it is ready; there the snapshot is taken. Then, and
whenever the snapshot is loaded, it reads its task: the time, a seed for its random numbers (or all that start from one
snapshot would draw the same), and a shell script, none for a shell on the console::

    u32 bytes that follow | u64 nanoseconds since 1970 | 32 bytes of seed | script
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import time
from pathlib import Path

import msgspec

from pyvmm import __version__
from pyvmm.cli.messages import complain
from pyvmm.devices.task_port import TASK_MAX, TaskPort
from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.machine.builder import build_machine
from pyvmm.machine.config import MachineConfig
from pyvmm.machine.device_config import DiskConfig, RngConfig
from pyvmm.machine.machine import Machine
from pyvmm.machine.tiny_linux import cache_folder

WAIT_WORD = "pyvmm.wait"
"""On the kernel command line: init asks the task port."""
KEPT = 8
"""Snapshots in the cache; the one longest unused goes first."""
_HEAD = struct.Struct("<IQ32s")
SCRIPT_MAX = 64 << 10
"""init's buffer."""


def task_of(script: str) -> bytes:
    """What init is to do. ConfigError if it is too long."""
    text = script.encode()
    if len(text) > min(SCRIPT_MAX, TASK_MAX - _HEAD.size):
        raise ConfigError(f"--exec: {len(text)} bytes of commands, {SCRIPT_MAX} are possible")
    return _HEAD.pack(_HEAD.size - 4 + len(text), time.time_ns(), os.urandom(32)) + text


def fast_machine(config: MachineConfig, quirks: frozenset[str], script: str) -> Machine:
    """A Linux about to do ``script``: from the cache, or booted and put there on the way."""
    for device in config.devices:
        if not isinstance(device, RngConfig) and not (isinstance(device, DiskConfig) and device.readonly):
            raise ConfigError("--fast: only --rng and read-only disks; other devices' far ends have moved on since")
    path = snapshot_path(config, quirks)
    if path.exists():
        from pyvmm.migration.snapshot import load_snapshot

        try:
            machine = load_snapshot(str(path), adapt=lambda _: config, quirks=quirks)
        except PyvmmError as error:
            complain(f"pyvmm: --fast boots anew: {error}")
        else:
            with contextlib.suppress(OSError):
                os.utime(path)
            task_port_of(machine).give(task_of(script))
            return machine
    machine = build_machine(config, quirks)
    port = task_port_of(machine)

    def ready() -> None:
        port.on_ready = lambda: None
        machine.request_call(lambda: _keep(machine, port, path, script))

    port.on_ready = ready
    return machine


def task_port_of(machine: Machine) -> TaskPort:
    """The machine's; every one has it."""
    return next(device for device in machine.devices if isinstance(device, TaskPort))


def snapshot_path(config: MachineConfig, quirks: frozenset[str]) -> Path:
    """Where the snapshot for this way to boot is, or would be: its name is made of all that boot depends on."""
    from pyvmm.host.profile import load_profile

    profile = load_profile()
    files = [config.image, config.initrd, *(d.path for d in config.devices if isinstance(d, DiskConfig))]
    depends = {
        "pyvmm": __version__,
        "files": [_identity(name) for name in files if name is not None],
        "config": msgspec.to_builtins(
            msgspec.structs.replace(config, name="", serial="null", timeout=None, start_paused=False)
        ),
        "quirks": sorted(quirks),
        # Not what was measured: speeds differ each time.
        "host": (profile.kind, profile.kernel, profile.cpu, profile.instructions, profile.capabilities),
    }
    return folder() / (hashlib.sha256(msgspec.json.encode(depends, order="sorted")).hexdigest()[:24] + ".pvsnap")


def folder() -> Path:
    """Where these snapshots are."""
    return cache_folder() / "fast"


def _identity(path: str) -> tuple[str, int, int]:
    real = os.path.realpath(path)
    try:
        found = os.stat(real)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    return real, found.st_size, found.st_mtime_ns


def _keep(machine: Machine, port: TaskPort, path: Path, script: str) -> None:
    """In the loop: save the machine that waits for its task, then let it have it."""
    from pyvmm.migration.snapshot import save_snapshot

    machine.pause()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_room(path.parent)
        save_snapshot(machine, str(path), description="pyvmm linux --fast")
    except (PyvmmError, OSError) as error:
        complain(f"pyvmm: --fast keeps no snapshot: {error}")
    port.give(task_of(script))
    machine.resume()


def _make_room(where: Path) -> None:
    with contextlib.suppress(OSError):  # somebody else makes room, too
        old = sorted(where.glob("*.pvsnap"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in old[KEPT - 1 :]:
            path.unlink()
