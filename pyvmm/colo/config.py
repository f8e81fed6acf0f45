"""How a VM is to be protected: what its owner says (``--colo`` and its like), checked before anything is opened."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pyvmm.colo.arbiter import NAME, arbiter_from
from pyvmm.colo.heartbeat import INTERVAL, INTERVALS, LOSS, LOSSES
from pyvmm.errors import ConfigError
from pyvmm.migration.channel import parse_uri
from pyvmm.net.compare import CompareTunables

STAGING = 256 << 20
MB = 1 << 20


class ColoConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``role`` is the one it begins with; after a failover a secondary is the primary."""

    role: Literal["primary", "secondary"]
    arbiter: str
    """``etcd:...``, ``file:PATH`` or ``none`` (arbiter.py)."""
    peer: str | None = None
    """A primary's secondary; ``None``: protected when somebody says so (``pyvmm colo protect``)."""
    pair: str = ""
    """Name in the arbiter; empty: made up by the primary."""
    insecure: bool = False
    """Plaintext over TCP."""
    automatic: bool = True
    """Whether a lost peer is a reason to take over; else ``x-colo-lost-heartbeat`` by hand."""
    heartbeat: float = INTERVAL
    """Seconds between two beats."""
    loss: int = LOSS
    """Beats missed that make a peer a lost one."""
    staging: Annotated[int, Meta(ge=1 << 20)] = STAGING
    """Bytes at most for a checkpoint's copy, at the primary."""
    compare: CompareTunables = CompareTunables()
    """How long, and how much, its network cards' frames may wait for one another."""
    metrics: str | None = None
    """HOST:PORT where scrapers are answered."""
    record: str | None = None
    """A file to write the conversation to."""

    def __post_init__(self) -> None:
        arbiter_from(self.arbiter)
        if self.pair and not NAME.fullmatch(self.pair):
            raise ConfigError(f"--colo-pair {self.pair!r}: has to be letters, digits, . _ - and at most 63 long")
        if self.peer is not None:
            if self.role != "primary":
                raise ConfigError("--peer is what a primary is told; a secondary waits at --incoming URI")
            if parse_uri(self.peer)[0] == "fd":
                raise ConfigError(f"--peer {self.peer}: protection needs several connections; give it tcp: or unix:")
        if not INTERVALS[0] <= self.heartbeat <= INTERVALS[1]:
            raise ConfigError(f"--heartbeat {self.heartbeat:g}: has to be {INTERVALS[0]:g} to {INTERVALS[1]:g} s")
        if not LOSSES[0] <= self.loss <= LOSSES[1]:
            raise ConfigError(f"--heartbeat-loss {self.loss}: has to be {LOSSES[0]} to {LOSSES[1]}")


def check_plaintext(uri: str, tls_creds: str, config: ColoConfig) -> None:
    """ConfigError if ``uri`` would carry a guest's memory, and commands over it, for anybody to read or forge."""
    if parse_uri(uri)[0] == "tcp" and not tls_creds and not config.insecure:
        raise ConfigError(f"{uri}: replication over TCP needs --tls-creds DIR (pyvmm certs makes them), or --insecure")
