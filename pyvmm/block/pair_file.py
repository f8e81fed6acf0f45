"""What a disk's image says of the pair it belongs to, so that a stale one is not started by accident.

It stands beside the image, in ``IMAGE.colo``, and is replaced as a whole (rename), so it is never half written. An
image without one belongs to no pair. While it is there, only protection opens the image:

========= ======================================================================================================
state     meaning
========= ======================================================================================================
protected the primary's; should it be found at a start, the other side may have taken the guest over
syncing   the secondary's, before it was the same as the primary's: half a copy
replica   the secondary's: the disk as of the last checkpoint; the guest is the other side's
overlaid  the survivor's: what it has written is in the overlay beside the image, until that is merged
========= ======================================================================================================
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pyvmm.errors import ConfigError, HostError, ImageError

SUFFIX = ".colo"
VERSION = 1
_SIZE_MAX = 4096

State = Literal["protected", "syncing", "replica", "overlaid"]
Role = Literal["primary", "secondary"]


class PairFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``term`` is that of the pair when this was written (arbiter)."""

    version: int = VERSION
    pair: Annotated[str, Meta(max_length=63)]
    term: Annotated[int, Meta(ge=0)]
    role: Role
    state: State


def pair_path(image: str) -> str:
    """Where the file of the image at path ``image`` is."""
    return image + SUFFIX


def overlay_path(image: str) -> str:
    """Where a replica's own writes go."""
    return f"{image}{SUFFIX}-overlay"


def log_path(image: str) -> str:
    """Where the primary's writes wait; a digit follows."""
    return f"{image}{SUFFIX}-log"


def read_pair(image: str) -> PairFile | None:
    """What stands beside ``image``. ImageError if that makes no sense, HostError if it cannot be read."""
    path = pair_path(image)
    try:
        with open(path, "rb") as file:
            data = file.read(_SIZE_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HostError(f"{path}: cannot be read: {error.strerror}; it says whether the disk may be used") from None
    try:
        found = msgspec.json.decode(data, type=PairFile)
    except msgspec.DecodeError as error:
        raise ImageError(path, "content", f"{error}; if you know the disk to be the newest, remove the file") from None
    if found.version != VERSION:
        raise ImageError(path, "version", f"{found.version}; this pyvmm knows version {VERSION}")
    return found


def write_pair(image: str, content: PairFile) -> None:
    """Durable, and whole, when this returns. OSError."""
    path = pair_path(image)
    new = f"{path}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, msgspec.json.encode(content) + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(new, path)
    sync_folder(path)


def remove_pair(image: str) -> None:
    """The image is a plain disk again, durably; nothing if it was one. OSError."""
    try:
        os.unlink(pair_path(image))
    except FileNotFoundError:
        return
    sync_folder(image)


def sync_folder(path: str) -> None:
    """Make durable what was made, renamed or removed at ``path``. OSError."""
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_startable(image: str, overlay: str | None = None) -> None:
    """ConfigError unless a VM that nobody protects may use ``image`` (under ``overlay``): why not, and the remedy."""
    found = read_pair(image)
    if found is None:
        return
    of_pair = f"disk {image}: belongs to the pair {found.pair}, term {found.term}"
    anyway = f"to use it all the same remove {pair_path(image)}"
    if found.state == "overlaid":
        newest = overlay_path(image)
        if overlay is not None and os.path.abspath(overlay) == os.path.abspath(newest):
            return
        raise ConfigError(f"{of_pair}, and its newest writes are in {newest}; use --disk {image},overlay={newest}")
    if found.state == "protected":
        raise ConfigError(f"{of_pair}, whose secondary may have taken the guest over since;"
                          f" if it has not (pyvmm colo status there), {anyway}")  # fmt: skip
    if found.state == "syncing":
        raise ConfigError(f"{of_pair}, and is half a copy of the primary's; use that one, or protect it again")
    raise ConfigError(f"{of_pair}, as a replica of the primary's at a checkpoint;"
                      " start it with --colo secondary, or, if the primary's is lost, make plain disks of all of that"
                      " machine's with pyvmm disk repair")  # fmt: skip
