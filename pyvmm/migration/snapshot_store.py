"""Where snapshots are that are called by a name: a folder of the user's."""

from __future__ import annotations

import os
from pathlib import Path

from pyvmm.errors import ConfigError

SUFFIX = ".pvsnap"


def store() -> Path:
    """$PYVMM_SNAPSHOTS, else pyvmm/snapshots among the user's data."""
    explicit = os.environ.get("PYVMM_SNAPSHOTS")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "pyvmm" / "snapshots"


def snapshot_path(name: str, *, make_folder: bool = False) -> str:
    """The file that ``name`` means: with a slash it is a path, else it is in the store. ConfigError for no name."""
    if "/" in name:
        return os.path.abspath(name)
    if not name or name.startswith(".") or "\0" in name or len(name) > 200:
        raise ConfigError(f"snapshot {name!r}: write a name, or a path with a slash in it")
    folder = store()
    if make_folder:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror}") from None
    return str(folder / (name if name.endswith(SUFFIX) else name + SUFFIX))
