"""Options of a machine that a guest is to be moved to, or that is to be moved: ``--incoming`` and its like."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import msgspec

from pyvmm.errors import ConfigError
from pyvmm.host.dirty_log import RING_FROM, Method

if TYPE_CHECKING:
    from pyvmm.qmp.monitor import Monitor

DEFER = "defer"


def add_migration_options(parser: argparse.ArgumentParser) -> None:
    """``--incoming`` and what goes with it."""
    add = parser.add_argument
    add("--incoming", metavar="URI|defer",
        help="wait for a guest that another pyvmm, started with the same options, sends to tcp:HOST:PORT, unix:PATH or"
        " fd:NUMBER; defer: until QMP migrate-incoming says where")  # fmt: skip
    add("--tls-creds", metavar="DIR", help="with --incoming: credentials (pyvmm certs) that the sender must match")
    add("--dirty-log", choices=("auto", "bitmap", "ring"), default="auto",
        help="how KVM logs written pages during a migration (default: what suits the host: pyvmm doctor)")  # fmt: skip


def resolve_dirty_log(chosen: str, memory: int) -> Method:
    """What ``--dirty-log`` says, or what suits this host for a guest of ``memory`` bytes."""
    if chosen != "auto":
        return "ring" if chosen == "ring" else "bitmap"
    if memory < RING_FROM:
        return "bitmap"  # on any host: the profile need not be looked at
    from pyvmm.host.dirty_log import choose_dirty_log
    from pyvmm.host.profile import load_profile

    return choose_dirty_log(load_profile(), memory)[0]


def is_incoming(args: argparse.Namespace) -> bool:
    """Whether a guest is expected. ConfigError: the URI is none, or options do not go together."""
    if args.incoming is None:
        if args.tls_creds is not None and args.colo is None:
            raise ConfigError("--tls-creds goes with --incoming; a source is told by pyvmm migrate --tls-creds")
        return False
    from pyvmm.migration.manager import check_incoming

    check_incoming(args.incoming)
    if args.incoming == DEFER and args.no_control and not args.qmp:
        raise ConfigError("--incoming defer: nobody could say where, with --no-control and no --qmp")
    return True


def take_guest_in(monitor: Monitor, args: argparse.Namespace) -> None:
    """Listen where ``--incoming`` says."""
    manager = monitor.migration
    if args.tls_creds is not None:
        manager.set_parameters(msgspec.structs.replace(manager.parameters, tls_creds=args.tls_creds))
    if args.incoming != DEFER:
        manager.listen(args.incoming)
