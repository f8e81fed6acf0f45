"""``pyvmm disk``: overlays, made, looked at, and ended one way or the other; replicas that nobody takes over."""

from __future__ import annotations

import argparse
from typing import Any

from pyvmm.errors import HostError

DIFFERENT = 1


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "disk",
        help="make, look at, commit or empty a copy-on-write overlay",
        description="Overlays for --disk BASE,overlay=FILE: FILE holds what differs from BASE, which stays as it is.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    for name, help_text, run in (
        ("create", "make an empty overlay (a machine started with one that is not there makes it, too)", _create),
        ("commit", "move what the overlay holds into its base; other overlays over that base are lost", _commit),
        ("discard", "empty the overlay: the disk is what its base is again", _discard),
        ("info", "say what an overlay is over and how large it is", _info),
    ):
        action = actions.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        action.add_argument("overlay", metavar="FILE")
        if name == "create":
            action.add_argument("base", metavar="BASE")
        action.set_defaults(run=run)
    help_text = "compare two disks by checksums of their pieces; status 1 if they are not the same"
    action = actions.add_parser("compare", help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    action.add_argument("first", metavar="IMAGE")
    action.add_argument("second", metavar="IMAGE")
    action.set_defaults(run=_compare)
    help_text = "make plain disks of a dead secondary's replicas, as of the newest checkpoint that all of them hold"
    action = actions.add_parser("repair", help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    action.add_argument("images", metavar="IMAGE", nargs="+", help="all of one secondary that its guest can write")
    action.set_defaults(run=_repair)


def _create(args: argparse.Namespace) -> int:
    from pyvmm.block.image import open_image
    from pyvmm.block.overlay import create_overlay

    with open_image(args.base, read_only=True) as base:
        create_overlay(args.overlay, base)
    return 0


def _open(args: argparse.Namespace) -> Any:
    from pyvmm.block.overlay import open_overlay, read_header

    return open_overlay(args.overlay, read_header(args.overlay).base_name)


def _commit(args: argparse.Namespace) -> int:
    try:
        with _open(args) as overlay:
            clusters = overlay.clusters_used
            overlay.commit()
            print(f"{clusters * 4} KiB moved into {overlay.base.path}")
    except OSError as error:
        raise HostError(
            f"{args.overlay}: not committed: {error.strerror} ({error.filename}); nothing is lost: mend that and commit"
            " again"
        ) from None
    return 0


def _discard(args: argparse.Namespace) -> int:
    try:
        with _open(args) as overlay:
            overlay.discard()
    except OSError as error:
        raise HostError(f"{args.overlay}: not emptied: {error.strerror}; mend that and try again") from None
    return 0


def _compare(args: argparse.Namespace) -> int:
    from pyvmm.block.disk_sums import differences
    from pyvmm.block.image import open_image

    try:
        with open_image(args.first, read_only=True) as first, open_image(args.second, read_only=True) as second:
            if first.size != second.size:
                print(f"{args.first} has {first.size} bytes, {args.second} {second.size}")
                return DIFFERENT
            different = 0
            for offset, size in differences(first, second):
                different += size
                print(f"{size} bytes from {offset:#x} on")
            print(f"{first.size} bytes, {'the same' if not different else f'{different} in pieces that differ'}")
            return DIFFERENT if different else 0
    except OSError as error:
        raise HostError(f"{args.first} and {args.second} cannot be compared: {error.strerror or error}") from None


def _repair(args: argparse.Namespace) -> int:
    from pyvmm.block.replica_repair import settle

    print(f"as of checkpoint {settle(args.images)}, as if the power had failed there: {', '.join(args.images)}")
    return 0


def _info(args: argparse.Namespace) -> int:
    from pyvmm.block.overlay import describe

    for name, value in describe(args.overlay).items():
        print(f"{name}: {value}")
    return 0
