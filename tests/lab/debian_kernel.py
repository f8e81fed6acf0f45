"""Debian's cloud kernel and the modules the lab loads, unpacked into the cache: nothing is installed on this machine.

``linux-image-cloud-amd64`` names the current kernel package; that one is downloaded by ``apt-get download`` (which
checks its signature and needs no root) and unpacked by ``dpkg-deb -x``. It brings no ``modules.dep`` (installing makes
that), so the order of loading comes from each module's own ``.modinfo`` section ("depends=").
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.machine.tiny_linux import cache_folder

META_PACKAGE = "linux-image-cloud-amd64"

MODULES = (
    "virtio_pci", "virtio_blk", "squashfs", "overlay",  # the lab's own root file system
    "kvm_amd", "irqbypass", "ccp",
    "tun", "bridge", "veth", "vhost_net",
    "loop",
)  # fmt: skip
"""By module name; what these depend on comes along. One that is built in, or that this kernel lacks, is left out."""


@dataclass(frozen=True)
class LabKernel:
    """An unpacked kernel package: ``bzimage``, and ``modules`` in an order in which insmod takes them."""

    release: str
    bzimage: Path
    modules: tuple[Path, ...]


def _apt(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=cwd)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise HostError(f"the lab needs Debian's {META_PACKAGE}: {' '.join(command[:3])}: {last}")
    return done.stdout


def _current_package() -> tuple[str, str]:
    """Name and version of the package META_PACKAGE stands for, e.g. linux-image-6.1.0-56-cloud-amd64, 6.1.192-2."""
    shown = _apt("apt-cache", "show", "--no-all-versions", META_PACKAGE)
    found = re.search(r"^Depends: (linux-image-\S+) \(= (\S+)\)", shown, re.MULTILINE)
    if found is None:
        raise HostError(f"the lab needs Debian's {META_PACKAGE}: apt-cache knows none here (apt-get update?)")
    return found[1], found[2]


def find_kernel() -> LabKernel:
    """The current kernel package from the cache, or downloaded into it. HostError: neither is possible."""
    kernels = cache_folder() / "lab" / "kernels"
    try:
        name, version = _current_package()
    except (HostError, OSError):
        # No apt, or an apt without lists, but a kernel of an earlier day: as good for a lab.
        earlier = sorted(kernels.glob("linux-image-*"), key=lambda path: path.stat().st_mtime)
        if not earlier:
            raise
        return _unpacked(earlier[-1])
    folder = kernels / f"{name}_{version}"
    if not folder.exists():
        _download(name, folder)
    return _unpacked(folder)


def _download(name: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".getting-") as work:
        _apt("apt-get", "download", "-q", name, cwd=Path(work))
        (package,) = Path(work).glob("*.deb")
        content = Path(work) / "content"
        _apt("dpkg-deb", "-x", str(package), str(content))
        try:
            content.rename(folder)  # appears complete
        except OSError:
            if not folder.exists():  # else another run was as fast
                raise
            shutil.rmtree(content)


def _unpacked(folder: Path) -> LabKernel:
    (bzimage,) = (folder / "boot").glob("vmlinuz-*")
    release = bzimage.name.removeprefix("vmlinuz-")
    return LabKernel(release, bzimage, tuple(load_order(folder / "lib/modules" / release, MODULES)))


def load_order(tree: Path, wanted: tuple[str, ...]) -> list[Path]:
    """The .ko files of ``wanted`` under ``tree``, each after those it depends on."""
    files = {module_name(path.stem): path for path in tree.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name)
        if path is None or path in order:
            return
        for other in depends_on(path):
            add(other)
        order.append(path)

    for name in wanted:
        add(module_name(name))
    return order


def module_name(text: str) -> str:
    """As the kernel writes it: file names have '-' where module names have '_'."""
    return text.replace("-", "_")


def depends_on(module: Path) -> list[str]:
    """Names in the module's ``depends=`` record: NUL-terminated key=value strings in section .modinfo."""
    from elftools.elf.elffile import ELFFile

    with module.open("rb") as stream:
        section = ELFFile(stream).get_section_by_name(".modinfo")
        records = section.data().split(b"\0") if section is not None else []
    depends = [record.removeprefix(b"depends=").decode() for record in records if record.startswith(b"depends=")]
    return [module_name(name) for text in depends for name in text.split(",") if name]
