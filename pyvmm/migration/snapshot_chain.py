"""A snapshot and those it builds on: a differential one holds only the pages in which it differs from its base.

::

    top  (runs of pages) ---base---> differential (runs of pages) ---base---> full one (all pages)

What a base is, is told by its id and the SHA-256 of its header, in which the CRCs of its RAM are: a base that was
saved anew under its old name is refused. Where it is, is told relative to the folder of the one that needs it, so that
a folder can be moved as a whole.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from pyvmm.errors import ConfigError, ImageError, PyvmmError
from pyvmm.memory.guest_memory import Region
from pyvmm.migration.snapshot_file import BaseStamp, RamPart, SnapshotFile
from pyvmm.migration.snapshot_store import SUFFIX
from pyvmm.migration.snapshot_zstd import read_compressed

CHAIN_MAX = 8
"""Snapshots in a chain: each may map :data:`RUNS_MAX` pieces, and a process has 65,530 mappings."""
RUNS_MAX = 2048


class SnapshotChain:
    """The open files from the full snapshot to the one asked for. A context manager.

    ImageError names what is wrong with which file; ConfigError, which base is missing or another than it was.
    """

    def __init__(self, path: str) -> None:
        self._stack = contextlib.ExitStack()
        self.files: list[SnapshotFile] = []
        with contextlib.ExitStack() as stack:
            top = stack.enter_context(SnapshotFile(path))
            self.files.append(top)
            while (stamp := self.files[0].header.base) is not None:
                if len(self.files) == CHAIN_MAX:
                    raise ImageError(path, "base", f"a chain of more than {CHAIN_MAX} snapshots")
                self.files.insert(0, stack.enter_context(_open_base(self.files[0], stamp)))
            self._stack = stack.pop_all()

    @property
    def top(self) -> SnapshotFile:
        """The one that was asked for; all but RAM is in it alone."""
        return self.files[-1]

    def __enter__(self) -> SnapshotChain:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def readable(self) -> Iterator[list[list[tuple[RamPart, int, int]]]]:
        """For each file from the full one up, for each region: (part, descriptor, offset) that can be mapped.

        What is compressed is read here, so that an error comes before a machine has changed; the regions were found
        to be the machine's before.
        """
        with contextlib.ExitStack() as stack:
            yield [[_mappable(file, part, stack) for part in file.header.ram] for file in self.files]


def map_layers(region: Region, layers: list[tuple[RamPart, int, int]]) -> None:
    """Have ``region`` hold the full snapshot's pages and above them the differential ones'. No vCPU runs."""
    (_, fd, offset), *above = layers
    region.map_file(fd, offset)
    for part, fd, offset in above:
        region.map_pages(fd, offset, part.runs or ())


def base_stamp(chain: SnapshotChain, path: str) -> BaseStamp:
    """What a snapshot at ``path`` says of the chain's top, its base. ConfigError if it cannot build on that."""
    if len(chain.files) == CHAIN_MAX:
        raise ConfigError(f"snapshot {chain.top.path}: has {CHAIN_MAX - 1} below it already; save a full one")
    here = os.path.realpath(path)
    if any(os.path.realpath(file.path) == here for file in chain.files):
        raise ConfigError(f"snapshot {path}: a snapshot cannot take the place of what it builds on; give another name")
    name = os.path.relpath(os.path.realpath(chain.top.path), os.path.dirname(here))
    return BaseStamp(name=name, id=chain.top.header.id, digest=chain.top.digest)


def dependents(path: str) -> list[str]:
    """The snapshots in the folder of ``path`` that build on it; there may be others elsewhere."""
    folder, here = os.path.dirname(os.path.abspath(path)), os.path.realpath(path)
    found = []
    for name in sorted(os.listdir(folder)):
        if not name.endswith(SUFFIX) or name.startswith("."):
            continue
        with contextlib.suppress(PyvmmError), SnapshotFile(os.path.join(folder, name)) as file:
            if file.header.base is not None and os.path.realpath(_base_path(file, file.header.base)) == here:
                found.append(name.removesuffix(SUFFIX))
    return found


def refuse_if_needed(path: str, what: str) -> None:
    """ConfigError if other snapshots build on the one at ``path``, which is about to be ``what``: "deleted"..."""
    with contextlib.suppress(OSError):
        if needed_by := dependents(path):
            names = ", ".join(needed_by[:8])
            raise ConfigError(f"snapshot {path}: cannot be {what}: {names} built on it; delete those first")


def _base_path(file: SnapshotFile, stamp: BaseStamp) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(os.path.realpath(file.path)), stamp.name))


def _open_base(file: SnapshotFile, stamp: BaseStamp) -> SnapshotFile:
    path = _base_path(file, stamp)
    if not os.path.exists(path):
        raise ConfigError(f"snapshot {file.path}: its base {path} is missing; bring it back")
    base = SnapshotFile(path)
    try:
        if (base.header.id, base.digest) != (stamp.id, stamp.digest):
            raise ConfigError(f"snapshot {file.path}: its base {path} is another than it was; bring the old one back")
        if [(p.gpa, p.size) for p in base.header.ram] != [(p.gpa, p.size) for p in file.header.ram]:
            raise ImageError(file.path, "ram", f"other regions than its base {path} has")
    except BaseException:
        base.__exit__()
        raise
    return base


def _mappable(file: SnapshotFile, part: RamPart, stack: contextlib.ExitStack) -> tuple[RamPart, int, int]:
    if file.header.compression == "none":
        return part, file.fd, part.offset
    region = Region(part.gpa, part.size, "decompressed")
    stack.callback(region.close)
    read_compressed(file.path, file.fd, part.offset, part.length, region)
    return part, region.fd, 0
