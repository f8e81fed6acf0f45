"""``pyvmm colo compare``: the disks of a running pair, by checksums.

First all pieces while the guest runs: most are the same, for they have been for long. What differs may be under way. So
the guest stands still, a checkpoint is made, and only those pieces are looked at again: now both sides must have the
same. Each side reads its own disk, and checksums are all that is sent.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from pyvmm.errors import HostError
from pyvmm.qmp.client import QmpClient

AT_ONCE = 16
CHECKPOINT_DEADLINE = 30.0
LOOK = 0.005


@dataclass
class Compared:
    """``differences``: (number of the disk, offset, bytes); ``paused``: seconds that the guest stood still for it."""

    disks: int = 0
    size: int = 0
    epoch: int = 0
    paused: float = 0.0
    differences: list[tuple[int, int, int]] = field(default_factory=list)


def compare_disks(primary: QmpClient, secondary: QmpClient) -> Compared:
    """HostError: they are no pair, or no checkpoint is made. Otherwise as QmpClient.execute."""
    ours, theirs = (client.execute("query-colo-status", oob=True) for client in (primary, secondary))
    if (ours["mode"], theirs["mode"]) != ("primary", "secondary") or ours["x-pair"] != theirs["x-pair"]:
        raise HostError(f"{primary.label} and {secondary.label} are not the primary and the secondary of one pair")
    found, suspects = Compared(), dict[int, list[int]]()
    number = 0
    while True:
        first = _sums(primary, number, 0)
        if not first["disks"]:
            raise HostError(f"{primary.label} has no disk that its guest can write")
        found.disks, piece, count = first["disks"], first["piece"], -(-first["size"] // first["piece"])
        found.size += first["size"]
        suspects[number] = [
            at + step
            for at in range(0, count, AT_ONCE)
            for step in _different(_sums(primary, number, at), _sums(secondary, number, at))
        ]
        number += 1
        if number == found.disks:
            break
    if any(suspects.values()):
        _look_again(primary, secondary, suspects, piece, found)
    found.epoch = primary.execute("query-colo-status", oob=True)["x-epoch"]
    return found


def _sums(client: QmpClient, disk: int, first: int, count: int = AT_ONCE) -> dict[str, Any]:
    wanted = {"disk": disk, "first": first, "count": count}
    answer: dict[str, Any] = client.execute("x-query-disk-sums", wanted, oob=True)
    return answer


def _different(ours: dict[str, Any], theirs: dict[str, Any]) -> list[int]:
    if (ours["size"], ours["piece"]) != (theirs["size"], theirs["piece"]):
        raise HostError("the two sides' disks are not of one size")
    return [at for at, (one, other) in enumerate(zip(ours["sums"], theirs["sums"], strict=True)) if one != other]


def _look_again(
    primary: QmpClient, secondary: QmpClient, suspects: dict[int, list[int]], piece: int, found: Compared
) -> None:
    running = primary.execute("query-status")["status"] in ("running", "colo")  # the latter: in a checkpoint just now
    began = time.monotonic()
    if running:
        primary.execute("stop")
    try:
        for _ in range(2):  # the first may have been under way, and be of before the guest stood still
            before = primary.execute("query-colo-stats", oob=True)["checkpoints"]
            primary.execute("colo-checkpoint-now")
            while primary.execute("query-colo-stats", oob=True)["checkpoints"] == before:
                if time.monotonic() - began > CHECKPOINT_DEADLINE:
                    raise HostError(f"{primary.label}: no checkpoint within {CHECKPOINT_DEADLINE:g} s")
                time.sleep(LOOK)
        for disk, numbers in suspects.items():
            for number in numbers:
                ours = _sums(primary, disk, number, 1)
                if _different(ours, _sums(secondary, disk, number, 1)):
                    offset = number * piece
                    found.differences.append((disk, offset, min(piece, ours["size"] - offset)))
    finally:
        if running:
            primary.execute("cont")
            found.paused = time.monotonic() - began
