"""The lab's root file system: two squashfs images of files of this machine, each at the path it has here.

``system``: the Python that runs this, its libraries and a few Debian packages (a C compiler for the tests that make
guests); kept in the cache under a hash of its files' names, sizes and times. ``project``: the checkout with what is
built in it, and the virtual environment; made anew for each run, in seconds. The lab lays one over the other.

Works where the interpreter is Debian's own (its package's files are taken) and where it is another one (its whole
prefix is taken); shared libraries are those ``ldd`` names.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

from pyvmm.errors import HostError
from pyvmm.machine.tiny_linux import cache_folder

REPOSITORY = Path(__file__).resolve().parents[2]

PACKAGES = [
    "gcc", "binutils", "libc6-dev", "libc6", "busybox-static", "dash", "bash", "coreutils", "util-linux", "procps",
    "e2fsprogs", "libseccomp2", "libc-bin",
]  # fmt: skip
"""Whose files the lab has, with all they depend on."""

CONFIGURATION = ["/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/ld.so.cache", "/etc/ld.so.conf"]
ROOT_LINKS = ["/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"]

NOT_IN_SYSTEM = re.compile(
    r"^/usr/share/(doc|man|locale|info|lintian|bash-completion|icons|perl|zoneinfo)/|^/usr/share/perl"
    r"|^/usr/lib/x86_64-linux-gnu/perl|^/(usr/)?lib/systemd/"
    r"|/(lto1|lto-wrapper|\S*lto-dump-\d+)$|/lib[alt]san\.a$|/lib(asan|tsan|lsan|ubsan|python3\.\d+)\.a$"
    r"|/lib/python3\.\d+/(site-packages|dist-packages|test|idlelib|tkinter|lib2to3|ensurepip|turtledemo)/"
    r"|/lib/python3\.\d+/\w+/tests?/"
)
NOT_IN_VENV = re.compile(r"/(mypy|mypyc|pip|ruff-[^/]*)/|__mypyc\.|/bin/ruff$")
NOT_IN_CHECKOUT = {".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "node_modules"}


def package_closure(roots: Iterable[str]) -> set[str]:
    """The installed Debian packages among ``roots`` and all they depend on, by dpkg's database."""
    fields = "${Package}\t${db:Status-Status}\t${Pre-Depends}, ${Depends}\t${Provides}\n"
    shown = subprocess.run(["dpkg-query", "-W", "-f", fields], capture_output=True, text=True, timeout=60, check=True)
    depends: dict[str, set[str]] = {}
    provided: dict[str, str] = {}
    for line in shown.stdout.splitlines():
        package, status, needs, provides = line.split("\t")
        if status == "installed":
            depends[package] = set(_package_names(needs))
            provided.update(dict.fromkeys(_package_names(provides), package))
    found: set[str] = set()
    todo = set(roots)
    while todo:
        name = todo.pop()
        package = name if name in depends else provided.get(name, "")
        if package and package not in found:
            found.add(package)
            todo |= depends[package]
    return found


def _package_names(field: str) -> list[str]:
    return [re.split(r"[ (:]", part.strip())[0] for part in re.split(r"[,|]", field) if part.strip()]


class FileList:
    """Paths of this machine for an image; each is added under its real folder, a link with what it leads to."""

    def __init__(self) -> None:
        self.paths: set[str] = set()

    def add(self, path: str) -> None:
        """One file, link or (empty) folder; what is not there is passed over."""
        folder, name = os.path.split(path)
        real = os.path.join(os.path.realpath(folder), name)
        if real in self.paths or not os.path.lexists(real):
            return
        self.paths.add(real)
        if os.path.islink(real):
            self.add(os.path.join(os.path.dirname(real), os.readlink(real)))

    def add_tree(self, top: str | Path, skip: set[str] | frozenset[str] = frozenset()) -> None:
        """All below ``top``, without folders named in ``skip``."""
        for folder, folders, files in os.walk(top):
            folders[:] = [name for name in folders if name not in skip]
            for name in files + [one for one in folders if os.path.islink(os.path.join(folder, one))]:
                self.add(os.path.join(folder, name))
            if not files and not folders:
                self.add(folder)

    def add_libraries(self) -> None:
        """The shared libraries that the listed ELF files need."""
        objects = [path for path in self.paths if re.search(r"\.so(\.|$)|/bin/", path) and _is_elf(path)]
        for start in range(0, len(objects), 200):
            # ldd's status is 1 as soon as one of the files is static: what it prints is what counts.
            shown = subprocess.run(["ldd", *objects[start : start + 200]], capture_output=True, text=True, timeout=120,
                                   check=False)  # fmt: skip
            for library in set(re.findall(r"(/\S+) \(0x", shown.stdout)):
                self.add(library)

    def drop(self, unwanted: re.Pattern[str]) -> None:
        """Take out the paths in which ``unwanted`` is found."""
        self.paths = {path for path in self.paths if not unwanted.search(path)}

    def key(self) -> str:
        """A hash of all names, sizes and times."""
        digest = hashlib.sha256()
        for path in sorted(self.paths):
            status = os.lstat(path)
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_mode}\n".encode())
        return digest.hexdigest()[:16]


def _is_elf(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as stream:
        return stream.read(4) == b"\x7fELF"


def system_files() -> FileList:
    """The interpreter, its libraries, the packages."""
    files = FileList()
    wanted = [*PACKAGES]
    if sys.base_prefix == "/usr":
        wanted += [f"python3.{sys.version_info.minor}"]
    else:
        files.add_tree(sys.base_prefix, frozenset({"site-packages", "__phello__"}))
        files.drop(NOT_IN_SYSTEM)
    packages = sorted(package_closure(wanted))
    listed = subprocess.run(["dpkg", "-L", *packages], capture_output=True, text=True, timeout=120, check=False).stdout
    for path in listed.splitlines():
        if path.startswith("/") and not os.path.isdir(path):
            files.add(path)
    venv = FileList()
    venv.add_tree(sys.prefix)
    venv.drop(NOT_IN_VENV)
    with_venv = FileList()
    with_venv.paths = files.paths | venv.paths
    with_venv.add_libraries()
    files.paths = with_venv.paths - venv.paths
    for path in CONFIGURATION + [link for link in ROOT_LINKS if os.path.islink(link)]:
        files.add(path)
    if sys.base_prefix == "/usr":
        # Byte code is not in dpkg's lists, and a lab that compiles the library anew starts a minute later.
        files.add_tree(f"/usr/lib/python3.{sys.version_info.minor}")
    files.drop(NOT_IN_SYSTEM)
    return files


def project_files() -> FileList:
    """The checkout as it is now, where its links lead, and the virtual environment."""
    files = FileList()
    files.add_tree(sys.prefix)
    files.drop(NOT_IN_VENV)
    files.add_tree(REPOSITORY, frozenset(NOT_IN_CHECKOUT))
    for link in (REPOSITORY / "build").iterdir():
        if link.is_symlink():  # the tiny kernel, in the cache
            files.add_tree(link.resolve())
    files.drop(re.compile(rf"^{re.escape(str(REPOSITORY))}/build/lab/"))
    return files


def write_squashfs(files: FileList, image: Path) -> None:
    """Make ``image`` of ``files``. HostError: mksquashfs is missing or fails."""
    part = image.with_name(f".{image.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    command = ["mksquashfs", "-", str(part), "-tar", "-comp", "zstd", "-Xcompression-level", "1"]
    command += ["-quiet", "-no-progress", "-all-root"]
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said)
        except FileNotFoundError:
            raise HostError("the lab needs mksquashfs: install squashfs-tools") from None
        assert process.stdin is not None
        try:
            # If it ends early, what it said matters, not that its pipe broke.
            with (
                contextlib.suppress(BrokenPipeError),
                process.stdin as stream,
                contextlib.suppress(BrokenPipeError),
                tarfile.open(fileobj=stream, mode="w|") as archive,
            ):
                for path in sorted(files.paths):
                    _add(archive, path)
            if process.wait(300) or not part.exists():
                said.seek(0)
                raise HostError(f"the lab's root: mksquashfs failed: {said.read().decode().strip()[-300:]}")
            part.rename(image)
        finally:
            process.kill()
            process.wait(10)
            part.unlink(missing_ok=True)


def _add(archive: tarfile.TarFile, path: str) -> None:
    """A file may vanish or grow while others work in the checkout: take it as it is when it is opened."""
    try:
        member = archive.gettarinfo(path, arcname=path.lstrip("/"))
        if member is None:  # a socket
            return
        # A hard link's first name may be outside the image.
        member.mtime = int(member.mtime)
        if not member.isreg() and not member.islnk():
            archive.addfile(member)
            return
        with open(path, "rb") as stream:
            content = stream.read()
    except FileNotFoundError:
        return


    member.type, member.linkname, member.size = tarfile.REGTYPE, "", len(content)
    archive.addfile(member, io.BytesIO(content))


def system_image() -> Path:
    """The system image from the cache, made if its files have changed since."""
    files = system_files()
    image = cache_folder() / "lab" / f"system-{files.key()}.squashfs"
    if not image.exists():
        image.parent.mkdir(parents=True, exist_ok=True)
        write_squashfs(files, image)
        for old in sorted(image.parent.glob("system-*.squashfs"), key=lambda path: path.stat().st_mtime)[:-3]:
            old.unlink(missing_ok=True)
    return image
