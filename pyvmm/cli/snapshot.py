"""``pyvmm snapshot save|load|list|info|delete``: machines kept in files. A snapshot does not hold disks."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import msgspec

from pyvmm.cli.machine_options import add_run_options, explain_ending, parse_timeout, resolve_quirks, run_machine
from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.machine.config import MachineConfig
from pyvmm.migration.snapshot_store import SUFFIX, snapshot_path, store

if TYPE_CHECKING:
    from pyvmm.machine.machine import Machine

SAVE_TIMEOUT = 600.0
"""Seconds: a large guest on a slow disk."""


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "snapshot",
        help="save machines to files and start from them",
        description="NAME is a name in the user's folder of snapshots, or a path with a slash in it.",
    )
    verbs = parser.add_subparsers(title="what to do", required=True, metavar="VERB")
    save = verbs.add_parser("save", help="save a running machine", description="The machine stands still meanwhile.")
    save.add_argument("machine", metavar="VM", help="its name (see pyvmm list)")
    save.add_argument("name", metavar="NAME")
    save.add_argument("--description", metavar="TEXT", default="")
    save.add_argument("--base", metavar="NAME", help="store only the pages that differ from this snapshot's")
    save.add_argument("--compress", choices=["none", "zstd"], default="none", help="zstd: smaller, slower to load")
    save.set_defaults(run=run_save)
    load = verbs.add_parser("load", help="start a machine from a snapshot")
    load.add_argument("snapshot", metavar="NAME")
    load.add_argument("--verify", action="store_true", help="read all of its memory first, to check it")
    add_run_options(load)
    load.set_defaults(run=run_load)
    listing = verbs.add_parser("list", help="list snapshots")
    listing.add_argument("folder", metavar="FOLDER", nargs="?", help="instead of the user's own")
    listing.add_argument("--json", action="store_true", help="for programs")
    listing.set_defaults(run=run_list)
    info = verbs.add_parser("info", help="say what is in a snapshot")
    info.add_argument("name", metavar="NAME")
    info.add_argument("--verify", action="store_true", help="read all of it, to check it")
    info.add_argument("--json", action="store_true", help="for programs")
    info.set_defaults(run=run_info)
    delete = verbs.add_parser("delete", help="delete a snapshot")
    delete.add_argument("name", metavar="NAME")
    delete.set_defaults(run=run_delete)


def run_save(args: argparse.Namespace) -> int:
    """Ask the machine's process; it writes the file."""
    from pyvmm.qmp.client import open_client

    arguments = {"tag": snapshot_path(args.name, make_folder=True), "description": args.description}
    if args.base is not None:
        arguments["base"] = snapshot_path(args.base)
    if args.compress != "none":
        arguments["compress"] = args.compress
    with open_client(args.machine, SAVE_TIMEOUT) as client:
        client.execute("snapshot-save", arguments)
    return 0


def run_load(args: argparse.Namespace) -> int:
    """Run from the snapshot; the status of the process."""
    from pyvmm.migration.snapshot import config_of, load_snapshot
    from pyvmm.migration.snapshot_file import SnapshotFile

    path = snapshot_path(args.snapshot)
    with SnapshotFile(path) as file:
        saved = config_of(file)
    config = msgspec.structs.replace(
        saved,
        name=args.name or saved.name,
        serial=args.serial,
        timeout=parse_timeout(args.timeout),
        no_reboot=args.no_reboot,
        no_shutdown=args.no_shutdown,
        start_paused=args.start_paused,
    )

    def build(config: MachineConfig, quirks: frozenset[str]) -> Machine:
        return load_snapshot(path, adapt=lambda _: config, quirks=quirks, verify=args.verify)

    ending, _ = run_machine(config, resolve_quirks(None), args, build=build)
    explain_ending(ending)
    return ending.status


def run_list(args: argparse.Namespace) -> int:
    """All files of a folder that are called snapshots, also those that are none any more."""
    folder = args.folder or str(store())
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(SUFFIX) and not name.startswith("."))
    except FileNotFoundError:
        if args.folder:
            raise ConfigError(f"{folder}: there is no such folder") from None
        names = []
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from None
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            rows.append({"name": name.removesuffix(SUFFIX)} | _facts(os.path.join(folder, name)))
        except PyvmmError as error:
            rows.append({"name": name.removesuffix(SUFFIX), "problem": str(error)})
    if args.json:
        _print_json(rows)
        return 0
    for row in rows:
        if "problem" in row:
            print(f"{row['name']:24} unusable: {row['problem']}")
        else:
            what = f"{row['machine']}: {row['description']}" + (f" (on {row['base']})" if row["base"] else "")
            print(f"{row['name']:24} {row['created']}  {row['memory_mib']:>6} MiB  {what}")
    return 0


def run_info(args: argparse.Namespace) -> int:
    """One snapshot's facts; ImageError or SectionError if it is damaged."""
    facts = _facts(snapshot_path(args.name), verify=args.verify)
    if args.json:
        _print_json(facts)
    else:
        for name, value in facts.items():
            if value is None:
                continue
            print(f"{name:12} {', '.join(value) if isinstance(value, list) else value}")
    return 0


def run_delete(args: argparse.Namespace) -> int:
    """Machines that were started from it go on: they have the file open. Refused if others build on it."""
    from pyvmm.migration.snapshot_chain import refuse_if_needed
    from pyvmm.migration.snapshot_file import SnapshotFile

    path = snapshot_path(args.name)
    if not path.endswith(SUFFIX):
        with SnapshotFile(path):  # what is none is not deleted by mistake
            pass
    refuse_if_needed(path, "deleted")
    try:
        os.unlink(path)
    except OSError as error:
        raise ConfigError(f"snapshot {path}: {error.strerror}") from None
    return 0


def _facts(path: str, *, verify: bool = False) -> dict[str, Any]:
    from pyvmm.migration.sections import decode_sections
    from pyvmm.migration.snapshot import config_of, verify_ram
    from pyvmm.migration.snapshot_chain import SnapshotChain

    with SnapshotChain(path) as chain:
        file = chain.top
        header, config = file.header, config_of(file)
        sections = decode_sections(file.state())
        chained = [lower.path for lower in reversed(chain.files[:-1])]
        if verify:
            verify_ram(chain)
    return {
        "path": path,
        "id": header.id,
        "machine": config.name,
        "description": header.description,
        "created": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(header.created)),
        "pyvmm": header.pyvmm,
        "image": config.image,
        "cpus": config.cpus,
        "memory_mib": config.memory >> 20,
        "compression": header.compression,
        "base": os.path.basename(chained[0]).removesuffix(SUFFIX) if chained else None,
        "chain": chained,
        "stored_mib": round(sum(part.pages for part in header.ram) / 256, 1),
        "sections": [f"{section.name} v{section.version}" for section in sections.values()],
        "disks": [stamp.path for stamp in header.disks],
    }


def _print_json(document: Any) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n")
