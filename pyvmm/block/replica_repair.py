"""Replicas whose pyvmm or host died are brought to one checkpoint: for when the primary's disks are lost."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence

from pyvmm.block.image import Image, open_image
from pyvmm.block.pair_file import log_path, overlay_path, read_pair, remove_pair, sync_folder
from pyvmm.block.replica_disk import LIMIT, write_record
from pyvmm.block.write_log import WriteLog
from pyvmm.errors import ConfigError, HostError


def repair(paths: Sequence[str]) -> int:
    """Bring the images at ``paths``, all of one machine's replicas, to one checkpoint after a crash; which it is.

    It is the newest one that all of them hold: none can have begun to commit one that another did not hold as a whole.
    0: at least one of them never got as far as a checkpoint, or is no replica. May itself be cut off, and done again.
    HostError.
    """
    replicas: list[tuple[Image, WriteLog]] = []
    try:
        for path in paths:
            found = read_pair(path)
            if found is None or found.state != "replica":
                return 0
            image = open_image(path, read_only=False)
            try:
                log = WriteLog(log_path(path), image.size, LIMIT)
            except BaseException:
                image.close()
                raise
            replicas.append((image, log))
            log.scan()
        target = min((max(log.held(), default=1) for _, log in replicas), default=0)
        for image, log in replicas:
            for epoch in log.held():
                if epoch <= target:
                    log.apply(epoch, functools.partial(write_record, image))
            os.fdatasync(image.fd)
        return target
    except OSError as error:
        raise HostError(f"a replica's disk cannot be repaired: {error}; see to the host's disk") from None
    finally:
        for image, log in replicas:
            image.close()
            log.close()


def settle(paths: Sequence[str]) -> int:
    """Make plain disks of the replicas at ``paths``, all of one machine's: of which checkpoint.

    May be cut off, and done again. ConfigError if one of them is no replica, HostError.
    """
    for path in paths:
        found = read_pair(path)
        if found is None or found.state != "replica":
            what = "is no replica" if found is None else f"is {found.state}, not a replica at a checkpoint"
            raise ConfigError(f"disk {path}: {what}; name all disks of one secondary, and no others")
    target = repair(paths)
    try:
        # What says that it is a replica goes last: without the logs a further repair changes nothing.
        for path in paths:
            for name in (log_path(path) + "0", log_path(path) + "1", overlay_path(path)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
        for path in paths:
            sync_folder(path)
        for path in paths:
            remove_pair(path)
    except OSError as error:
        raise HostError(f"a replica's disk cannot be settled: {error}; mend that and try again") from None
    return target
