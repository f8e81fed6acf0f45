"""C programs of the tests' own in the tiny Linux."""

from __future__ import annotations

import subprocess
from pathlib import Path

from pyvmm.machine.tiny_linux import find_initramfs
from tests.unit.linux.scripts import load_script


def initramfs_with(folder: Path, *sources: Path) -> Path:
    """A root file system in ``folder``: the tiny Linux's, and in / the program of each of ``sources``, without .c.

    Statically linked, and without AVX but where the source asks for it: not every host's guests have it.
    """
    cpio = load_script("guests/linux/cpio.py")
    members = []
    for source in sources:
        program = folder / source.stem
        subprocess.run(
            ["gcc", "-O2", "-static", "-mno-avx", "-Wall", "-Werror", "-o", str(program), str(source)],
            check=True, timeout=60,
        )  # fmt: skip
        members.append(cpio.file(source.stem, program.read_bytes(), 0o755))
    initramfs = folder / "initramfs.cpio"
    # The kernel unpacks archives that follow each other into one root file system.
    initramfs.write_bytes(Path(find_initramfs(None)).read_bytes() + cpio.write_archive(members))
    return initramfs
