"""Options of a machine that is to be protected, or to be the replica of one: ``--colo`` and what goes with it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyvmm.errors import ConfigError

if TYPE_CHECKING:
    from pyvmm.colo.config import ColoConfig
    from pyvmm.qmp.monitor import Monitor


def add_colo_options(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    add = parser.add_argument
    add("--colo", choices=("primary", "secondary"),
        help="protect the guest: it lives on in the secondary when the primary dies; or be that secondary, which waits"
        " at --incoming URI")  # fmt: skip
    add("--arbiter", metavar="A",
        help="who decides to whom the guest belongs: etcd:HOST:PORT[,HOST:PORT...], file:PATH (one host), or none,"
        " which risks two owners")  # fmt: skip
    add("--peer", metavar="URI", help="where the secondary waits: tcp:HOST:PORT or unix:PATH (default: none yet; see"
        " pyvmm colo protect)")  # fmt: skip
    add("--colo-mode", choices=("hybrid", "periodic"), default="hybrid",
        help="hybrid (default): both run and are compared; periodic: the secondary stands still, and what the guest"
        " says waits for the next checkpoint")  # fmt: skip
    add("--checkpoint-delay", metavar="MS", help="longest time between two checkpoints (default 20000; periodic: 100)")
    add("--colo-pair", metavar="NAME", help="name of the pair at the arbiter (default: made up)")
    add("--colo-staging", metavar="SIZE", help="memory for the copy of a checkpoint, at most (default 256M)")
    add("--colo-delta", choices=("off", "xor", "lz4"), default="xor",
        help="send pages as what changed in them: xor (default), lz4 (for slow links), off: whole")  # fmt: skip
    add("--colo-record", metavar="FILE", help="keep the conversation of the two (see pyvmm colo replay)")
    add("--object", metavar="OBJECT", action="append", default=[],
        help="colo-compare[,compare_timeout=MS][,expired_scan_cycle=MS][,max_queue_size=N][,KIND=POLICY...]: how"
        " long, and how much, frames of network cards wait for one another (3000, 1000, 1024), and what is done with"
        " a KIND of them (tcp, udp, icmp, arp, fragment, ip, other): compare (default), release, checkpoint",
    )  # fmt: skip
    add("--metrics", metavar="HOST:PORT", help="answer Prometheus there: roles, checkpoints, pauses, failovers")
    add("--heartbeat", metavar="MS", help="time between two heartbeats (default 50)")
    add("--heartbeat-loss", metavar="N", help="heartbeats missed that start a failover (default 4)")
    add("--failover", choices=("auto", "manual"), default="auto",
        help="manual: only x-colo-lost-heartbeat, or pyvmm colo failover, starts one")  # fmt: skip
    add("--insecure", action="store_true", help="replicate over TCP without TLS")


def colo_config_of(args: argparse.Namespace) -> ColoConfig | None:
    """What the options ask for; ConfigError if they do not go together."""
    if args.colo is None:
        for option in ("arbiter", "peer", "colo_pair", "colo_record", "colo_staging", "metrics"):
            if getattr(args, option) is not None:
                raise ConfigError(f"--{option.replace('_', '-')} goes with --colo primary or --colo secondary")
        if args.object:
            raise ConfigError("--object: goes with --colo primary or --colo secondary")
        return None
    if args.arbiter is None:
        raise ConfigError(f"--colo {args.colo}: say who decides in the end: --arbiter etcd:HOST:PORT, file:PATH, none")
    if args.colo == "secondary" and args.incoming is None:
        raise ConfigError("--colo secondary: say where it waits for the primary: --incoming URI")
    if args.colo == "primary" and args.incoming is not None:
        raise ConfigError("--colo primary: --incoming is for the secondary; use --peer URI")
    from pyvmm.cli.colo_objects import compare_tunables_of
    from pyvmm.colo.config import STAGING, ColoConfig, check_plaintext
    from pyvmm.colo.heartbeat import INTERVAL, LOSS
    from pyvmm.machine.config import parse_number, parse_size

    beat = parse_number(args.heartbeat, "--heartbeat", maximum=60_000) / 1000 if args.heartbeat else INTERVAL
    config = ColoConfig(
        role=args.colo, arbiter=args.arbiter, peer=args.peer, pair=args.colo_pair or "", insecure=args.insecure,
        automatic=args.failover == "auto", heartbeat=beat,
        loss=parse_number(args.heartbeat_loss, "--heartbeat-loss", maximum=1000) if args.heartbeat_loss else LOSS,
        staging=parse_size(args.colo_staging, "--colo-staging") if args.colo_staging else STAGING,
        record=args.colo_record, metrics=args.metrics, compare=compare_tunables_of(args.object),
    )  # fmt: skip
    for uri in (args.incoming, args.peer):
        if uri is not None and uri != "defer":
            check_plaintext(uri, args.tls_creds or "", config)
    return config


def set_up_colo(monitor: Monitor, config: ColoConfig, args: argparse.Namespace) -> None:
    """Before the machine runs; a primary that has a peer begins to be protected as soon as it runs."""
    import msgspec

    from pyvmm.machine.config import parse_number

    monitor.set_up_colo(config)
    manager = monitor.migration
    delay = args.checkpoint_delay
    manager.set_parameters(msgspec.structs.replace(
        manager.parameters, x_colo_mode=args.colo_mode, x_colo_delta=args.colo_delta, tls_creds=args.tls_creds or "",
        x_checkpoint_delay=parse_number(delay, "--checkpoint-delay", maximum=86_400_000) or 1 if delay else None,
    ))  # fmt: skip
    peer = config.peer
    if peer is not None:
        assert monitor.protection is not None
        protection = monitor.protection
        monitor.machine.loop.post(lambda: protection.protect(peer))
