"""What can be set about a migration, and where one stands: QEMU's names and units (qapi/migration.json).

Unknown names and values out of range are refused by name; nothing is set then.
"""

from __future__ import annotations

import enum
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from pyvmm.errors import ConfigError

CHECKPOINT_DELAY: Final = {"hybrid": 20_000, "periodic": 100}
"""Milliseconds between two checkpoints, by mode."""


class MigrationStatus(enum.Enum):
    """Where a migration stands. COLO adds its own between active and completed."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    DEVICE = "device"
    COLO = "colo"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def under_way(self) -> bool:
        """Whether there is a migration that could still fail, succeed or be cancelled."""
        return self in _UNDER_WAY


_UNDER_WAY = frozenset(
    {
        MigrationStatus.SETUP,
        MigrationStatus.ACTIVE,
        MigrationStatus.DEVICE,
        MigrationStatus.COLO,
        MigrationStatus.CANCELLING,
    }
)


class Parameters(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """migrate-set-parameters. Bandwidths are bytes a second, limits milliseconds, throttling percent."""

    max_bandwidth: Annotated[int, Meta(ge=0, le=1 << 40)] = 0
    """0: as fast as the connection takes it."""
    downtime_limit: Annotated[int, Meta(ge=0, le=2_000_000)] = 300
    """How long the guest may stand still at the end."""
    cpu_throttle_initial: Annotated[int, Meta(ge=1, le=99)] = 20
    cpu_throttle_increment: Annotated[int, Meta(ge=1, le=99)] = 10
    max_cpu_throttle: Annotated[int, Meta(ge=1, le=99)] = 99
    throttle_trigger_threshold: Annotated[int, Meta(ge=1, le=100)] = 50
    """Percent of what was sent in a round that must be dirty again for the guest to be slowed down."""
    announce_initial: Annotated[int, Meta(ge=0, le=100_000)] = 50
    """Milliseconds between the first two times that the network is told where the guest is now."""
    announce_max: Annotated[int, Meta(ge=0, le=100_000)] = 550
    announce_rounds: Annotated[int, Meta(ge=0, le=1000)] = 5
    """How often it is told."""
    announce_step: Annotated[int, Meta(ge=0, le=10_000)] = 100
    """By how much the time between two grows, up to ``announce_max``."""
    tls_creds: str = ""
    """A folder of credentials (``pyvmm certs``); empty: no TLS."""
    tls_hostname: str = ""
    """Name that the destination's certificate must have, if not the URI's host."""
    x_checkpoint_delay: Annotated[int, Meta(ge=1, le=86_400_000)] | None = None
    """Milliseconds between two checkpoints of a protected VM; None: what suits the mode."""
    x_checkpoint_timeout: Annotated[int, Meta(ge=100, le=3_600_000)] = 5000
    """Milliseconds that each wait within a checkpoint may take. pyvmm's own."""
    x_colo_mode: Literal["hybrid", "periodic"] = "hybrid"
    """Whether the secondary's guest runs, too. pyvmm's own."""
    x_colo_delta: Literal["off", "xor", "lz4"] = "xor"
    """How checkpoints are made smaller (colo/delta.py). pyvmm's own."""
    x_stall_timeout: Annotated[int, Meta(ge=100, le=3_600_000)] = 10_000
    """How long the peer may do nothing before it counts as gone. pyvmm's own."""

    @property
    def checkpoint_delay(self) -> int:
        """Milliseconds."""
        return self.x_checkpoint_delay or CHECKPOINT_DELAY[self.x_colo_mode]


class Capabilities(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """migrate-set-capabilities."""

    auto_converge: bool = False
    zero_blocks: bool = True
    compress: bool = False
    """LZ4, for links that are slower than compressing."""
    events: bool = False
    """Clients are told by MIGRATION and MIGRATION_PASS."""
    x_colo: bool = False


_S = TypeVar("_S", bound=msgspec.Struct)


def with_changes(old: _S, changes: dict[str, Any]) -> _S:
    """``old`` with ``changes`` (by QEMU's names) applied; ConfigError names what is unknown or out of range."""
    known = msgspec.to_builtins(old)
    for name in changes:
        if name not in known:
            raise ConfigError(f"there is no {name!r}; there is {', '.join(sorted(known))}")
    try:
        return msgspec.convert({**known, **changes}, type(old))
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None
